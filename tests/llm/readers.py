"""Logits of models that were merged here, as `transformers` computes them.

    python tests/llm/readers.py cases.json logits.safetensors

`cases.json` is a list of `name`, `folder`, `gguf` (a file in the folder, or null for its safetensors) and
`ids`. Needs torch, transformers, accelerate, safetensors and gguf.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(cases, output):
    logits = {}
    with open(cases) as file:
        cases = json.load(file)
    for case in cases:
        options = {"gguf_file": case["gguf"]} if case["gguf"] else {}
        model, loaded = AutoModelForCausalLM.from_pretrained(
            case["folder"], dtype=torch.float32, output_loading_info=True, **options
        )
        for what in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
            if loaded[what]:
                sys.exit(f"{case['name']}: {what}: {loaded[what]}")
        model.eval()
        with torch.no_grad():
            logits[case["name"]] = model(torch.tensor([case["ids"]])).logits[0].contiguous()
    save_file(logits, output)


main(*sys.argv[1:])
