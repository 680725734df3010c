"""Writes tests/golden/transformers: small random models as transformers saves them, with the logits and tokens
that it computes itself.

    python tests/llm/folders.py tests/golden/transformers

Made with transformers 5.24.0, tokenizers of its release and torch 2.15.0; seeds are fixed, so the files are the same
each time.
"""

import json
import os
import shutil
import sys

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

OUT = sys.argv[1]
CORPUS = ["the cat sat on the mat, and the hat.\n", "12 mice ran 3456 miles;\n\nnobody's cat ran.  Why?\n", "It's 7 o'clock: café.\n"] * 20
TEXTS = ["the cat sat", " two  blanks\n\nand 12345 miles", "It's café é 😀.\n", "a<|im_start|>b", "", "x\ty\r\nz"]
CHAT = [
    [{"role": "user", "content": "the cat?"}],
    [{"role": "system", "content": "be  short"}, {"role": "user", "content": "12 mice\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}, {"role": "user", "content": "c"}],
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]

# Templates of one's own in the manner of published ones: blocks with blanks around them, methods, tags, loops.
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0].content.strip() %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- if system is defined %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}
{% for message in rest %}
    {%- if message.role == 'assistant' %}
<|im_start|>{{ message.role }}
{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}

    {%- elif message.get('tool_calls') %}
        {{- raise_exception('no tools') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.rstrip() + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
PLAIN = """{% for m in messages %}
{{ m['role'].upper() }}: {{ m.content.replace('cat', 'dog').split('?')[0] }}{% if not loop.last %} / {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ bos_token }}ANSWER {{ messages[::-1][0] | tojson }}{% endif %}"""


def byte_level(regex, normalizer=None, first=None):
    t = Tokenizer(models.BPE())
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    byte = processors.ByteLevel(trim_offsets=False)
    if first:
        one = processors.TemplateProcessing(single=f"{first} $A", pair=f"{first} $A {first} $B:1", special_tokens=[(first, t.token_to_id(first))])
        t.post_processor = processors.Sequence([byte, one])
    else:
        t.post_processor = byte
    return t


def sentence_piece():
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"] + SPECIAL[2:] + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    t.train_from_iterator(CORPUS, trainer)
    vocabulary = json.loads(t.to_str())
    # Bytes are tokens of the model, not special ones.
    vocabulary["added_tokens"] = [a for a in vocabulary["added_tokens"] if not a["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(vocabulary))


def fast(tokenizer, **more):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def write(name, model, tokenizer, variants=()):
    folder = os.path.join(OUT, name)
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1) + (0 if p.dim() > 1 else 1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(folder)
    ids = [[(7 * i + i * i) % model.config.vocab_size for i in range(40)]]
    expected = {"ids": ids, "logits": {}, "texts": [], "chats": []}
    for text in TEXTS:
        expected["texts"].append({"text": text, "ids": read(text)["input_ids"]})
    for chat in CHAT:
        asked = read.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected["chats"].append({"messages": chat, "ids": asked})
    for variant, change in [("config.json", {})] + list(variants):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **change)
        if change:
            loaded.config.save_pretrained(os.path.join(folder, "tmp"))
            os.replace(os.path.join(folder, "tmp", "config.json"), os.path.join(folder, variant))
            os.rmdir(os.path.join(folder, "tmp"))
        with torch.no_grad():
            logits = loaded(torch.tensor(ids)).logits[0]
        # The last token, and one in the middle.
        expected["logits"][variant] = {str(at): logits[at].tolist() for at in (11, 39)}
    with open(os.path.join(folder, "expected.json"), "w") as f:
        json.dump(expected, f)


SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=300, max_position_embeddings=128)
SCALED = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
variant = [("scaled.json", {"rope_parameters": SCALED})]

names = dict(bos_token="<|bos|>", eos_token="<|eos|>")
write(
    "llama",
    LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=[1, 3])),
    fast(byte_level(LLAMA3, first="<|bos|>"), chat_template=CHATML, model_max_length=64, **names),
    variant,
)
write(
    "qwen2",
    Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)),
    fast(byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC()), chat_template=PLAIN, add_bos_token=False, pad_token=AddedToken("<|eos|>", special=True), **names),
    variant,
)
write(
    "qwen3",
    Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, bos_token_id=1, eos_token_id=2)),
    fast(sentence_piece(), chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "none"}], bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False),
    variant,
)
