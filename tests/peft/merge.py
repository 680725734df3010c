"""Merges an OFT folder with the real PEFT: merge.py BASE ADAPTER_FOLDER OUTPUT.

The model has one module for each weight of BASE: a convolution for rank 4, an embedding where the name
says so, a linear layer otherwise. OUTPUT holds the merged weights.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file


def module(name, weight):
    if weight.dim() == 4:
        out, width, *kernel = weight.shape
        made = torch.nn.Conv2d(width, out, tuple(kernel), bias=False)
    elif "table" in name or "embed" in name:
        made = torch.nn.Embedding(*weight.shape)
    else:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight)
    return made


def main(base, adapter, output):
    model = torch.nn.Module()
    for key, weight in sorted(load_file(base).items()):
        *path, last = key.split(".")
        if last != "weight":
            continue
        parent = model
        for part in path[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(path[-1], module(key, weight))
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    save_file({k: v.contiguous() for k, v in merged.state_dict().items()}, output)


main(*sys.argv[1:])
