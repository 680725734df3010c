"""Writes tests/golden/lora: LoRA and DoRA folders of the real PEFT, with what it computes from them.

    python tests/peft/lora.py tests/golden/lora

Made with PEFT 0.21.2 and torch 2.15.0. A case holds the folder that `save_pretrained` writes, `base.safetensors`, and
`io.safetensors`: input `x`, output `y`, upstream `g`, the gradients of `sum(y * g)` by the names of the tensors, and the
weights that `merge_and_unload` gives.
"""

import os
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

OUT = sys.argv[1]


class Linears(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Turned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Conv1D(24, 16)

    def forward(self, x):
        return self.up(x)


class Images(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = torch.nn.Conv2d(6, 5, 1)

    def forward(self, x):
        return self.point(torch.tanh(self.conv(x)))


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.table(x))


def case(name, model, x, **config):
    torch.manual_seed(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    folder = os.path.join(OUT, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, os.path.join(folder, "base.safetensors"))
    peft = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for n, p in peft.named_parameters():
            if "lora_magnitude" in n:
                p.mul_(1 + 0.2 * torch.randn_like(p))
            elif "lora_" in n:
                p.copy_(torch.randn_like(p) * 0.2)
            elif p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    peft.eval()
    y = peft(x)
    g = torch.randn_like(y)
    (y * g).sum().backward()
    io = {"x": x, "y": y.detach(), "g": g}
    for n, p in peft.named_parameters():
        if p.grad is not None:
            io["grad." + n.replace("base_model.model.", "").replace(".default", "")] = p.grad
    peft.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md")) if os.path.exists(os.path.join(folder, "README.md")) else None
    for k, v in peft.merge_and_unload().state_dict().items():
        io["merged." + k] = v
    save_file({k: v.detach().contiguous() for k, v in io.items()}, os.path.join(folder, "io.safetensors"))


torch.manual_seed(0)
x = torch.randn(5, 16)
both = ["up", "down"]
case("lora", Linears(), x, r=4, lora_alpha=12, target_modules=both)
case("dora", Linears(), x, r=4, lora_alpha=6, use_dora=True, target_modules=both)
case("rslora", Linears(), x, r=4, lora_alpha=3, use_rslora=True, target_modules=["up"], bias="lora_only")
case("patterns", Linears(), x, r=4, lora_alpha=8, target_modules=both, rank_pattern={"down": 2}, alpha_pattern={"up": 3})
case("transposed", Turned(), x, r=3, lora_alpha=6, fan_in_fan_out=True, target_modules=["up"])
case("conv", Images(), torch.randn(2, 4, 7, 7), r=3, lora_alpha=6, target_modules=["conv", "point"])
case("embedding", Tokens(), torch.randint(0, 12, (2, 5)), r=3, lora_alpha=6, target_modules=["table"], modules_to_save=["head"])
