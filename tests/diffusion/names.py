"""Where diffusers takes the layers of checkpoints in one file from: tests/golden/names.json.

    python tests/diffusion/names.py tests/golden/names.json

Made with diffusers 0.42.1, transformers 5.24.0, torch 2.15.0. The file lists the tensors of small models with
their shapes. Every number of every tensor says which tensor, row and column it is; diffusers' own converters
rename and cut them, and what comes out is written down as `layers`: module, tensor, rows, and whether it was
transposed. Modules are also compared with those of diffusers' models.
"""

import inspect
import json
import sys

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

UNET = "model.diffusion_model."
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# Rows and columns stay below it.
WIDE = 1000


def numbered(tensors):
    """Tensors whose numbers say where they are, beside zeros for all that is no layer."""
    out = {}
    for i, (name, shape) in enumerate(tensors.items()):
        rows, width = shape[0], int(torch.tensor(shape[1:]).prod())
        at = torch.arange(rows)[:, None] * WIDE + torch.arange(width)[None] % WIDE
        out[name] = (at + (i + 1) * WIDE * WIDE).double().reshape(shape)
        if name.endswith("weight"):
            out[name[: -len("weight")] + "bias"] = torch.zeros(rows)
    return out


def traced(tensors, converted, before):
    """Module to tensor, rows and side, from the numbers."""
    names, layers = list(tensors), {}
    for key, weight in converted.items():
        if not key.endswith(".weight") or weight.ndim < 2 or not weight.any():
            continue
        flat = weight.reshape(weight.shape[0], -1).long()
        name = names[int(flat[0, 0]) // WIDE**2 - 1]
        rows, columns = flat % WIDE**2 // WIDE, flat % WIDE
        turned = flat.shape[1] > 1 and int(rows[0, 1]) != int(rows[0, 0])
        own = (columns if turned else rows)[:, 0].tolist()
        ranges = []
        for row in own:
            if ranges and ranges[-1][1] == row:
                ranges[-1][1] += 1
            else:
                ranges.append([row, row + 1])
        layers[before + key[: -len(".weight")]] = [name, ranges, turned]
    return layers


def modules(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def flux(tensors):
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    # The width is fixed there.
    scope = dict(vars(single_file_utils))
    exec(source.replace("3072", str(tensors["img_in.weight"][0])), scope)
    checkpoint = numbered(tensors)
    for block in ["double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"]:
        for norm in ["query", "key"]:
            checkpoint[f"{block}.norm.{norm}_norm.scale"] = torch.zeros(1)
    model = FluxTransformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )
    converted = scope["convert_flux_transformer_checkpoint_to_diffusers"](checkpoint)
    return traced(tensors, converted, "transformer."), {"transformer." + name for name in modules(model)}


def sd3(tensors):
    checkpoint = numbered(tensors) | {"pos_embed": torch.zeros(1, 16, 16)}
    for block in ["0.x_block.attn", "0.x_block.attn2", "0.context_block.attn", "1.x_block.attn", "1.context_block.attn"]:
        for norm in "qk":
            checkpoint[f"joint_blocks.{block}.ln_{norm}.weight"] = torch.zeros(1)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=12, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=8, out_channels=12,
        dual_attention_layers=(0,), qk_norm="rms_norm", pos_embed_max_size=4,
    )
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    return traced(tensors, converted, "transformer."), {"transformer." + name for name in modules(model)}


def unet(tensors, **config):
    model = UNet2DConditionModel(sample_size=8, cross_attention_dim=16, attention_head_dim=2, **config)
    checkpoint = {name: value for name, value in numbered(tensors).items() if name.startswith(UNET)}
    checkpoint |= {UNET + name: torch.zeros(1) for name in ["out.0.weight", "out.0.bias"]}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, model.config)
    return traced(tensors, converted, "unet."), {"unet." + name for name in modules(model)}


def sd1(tensors):
    return unet(
        tensors, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl(tensors):
    layers, names = unet(
        tensors, block_out_channels=(32, 32, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=2, projection_class_embeddings_input_dim=16,
    )
    checkpoint = numbered(tensors)
    first = single_file_utils.convert_ldm_clip_checkpoint(dict(checkpoint), remove_prefix=CLIP)
    of_clip = {key: value for key, value in first.items() if key.startswith("text_model.")}
    layers |= traced(tensors, of_clip, "text_encoder.")
    config = CLIPTextConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        projection_dim=12, max_position_embeddings=8, bos_token_id=1, eos_token_id=2,
    )
    model = CLIPTextModelWithProjection(config)
    open_clip = {key: value for key, value in checkpoint.items() if key.startswith(OPEN_CLIP)}
    second = single_file_utils.convert_open_clip_checkpoint(model, open_clip, prefix=OPEN_CLIP)
    layers |= traced(tensors, second, "text_encoder_2.")
    # Embeddings are no linear layers, and the first encoder has the names of its checkpoint.
    embeddings = {name for name in layers if "embedding" in name.rsplit(".", 1)[1] and "text_model" in name}
    names |= {"text_encoder_2." + name for name in modules(model)} | embeddings
    return layers, names | {name for name in layers if name.startswith("text_encoder.")}


def main(path):
    with open(path) as file:
        families = json.load(file)
    for name, make in [("flux", flux), ("sd3", sd3), ("sd1", sd1), ("sdxl", sdxl)]:
        layers, names = make(families[name]["tensors"])
        assert set(layers) == names, set(layers) ^ names
        families[name]["layers"] = layers
    with open(path, "w") as file:
        json.dump(families, file, indent=None, sort_keys=True, separators=(",", ":"))
        file.write("\n")


main(sys.argv[1])
