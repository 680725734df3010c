"""What `transformers` computes with the weights of a GGUF file of SmolLM2: token ids, loss and logits.

    python tests/llm/reference.py SmolLM2-135M-Instruct.Q4_1.gguf > tests/golden/smollm2.json

Needs torch, transformers and gguf. The answer is shipped, so that the tests need none of them.
"""

import json
import os
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "Define Happiness.",
    "An agreeable sensation arising from contemplating the misery of another.",
    "In 1911 there were 1,024 entries; 3.14159 of them were round.",
    "  two spaces,\ttabs\nand\n\nlines   ",
    "Größe, naïve, Привет мир, 你好，世界, مرحبا, 🙂🙂",
    "don't we'll I'M HE'S it's",
    "<|im_start|>user\nHello<|im_end|>\n",
]


def main(path):
    folder, name = os.path.split(os.path.abspath(path))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.eval()
    tokens = {text: tokenizer.encode(text, add_special_tokens=False) for text in TEXTS}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[0]}], tokenize=False, add_generation_prompt=True
    )
    start = tokenizer.encode(prompt, add_special_tokens=False)
    ids = start + tokenizer.encode(TEXTS[1], add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    losses = torch.nn.functional.cross_entropy(
        logits[len(start) - 1 : -1], torch.tensor(ids[len(start) :]), reduction="none"
    )
    last = logits[-1]
    print(json.dumps({
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "file": name,
        "tokens": tokens,
        "prompt": start,
        "ids": ids,
        "loss": losses.mean().item(),
        "largest_logit": last.abs().max().item(),
        "last_logits": [round(v, 6) for v in last[::64].tolist()],
    }, ensure_ascii=False, indent=1))


main(sys.argv[1])
