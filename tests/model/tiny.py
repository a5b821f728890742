"""Single blocks, small enough for the slow reference."""

import torch
from torch import nn
from transformers import AutoConfig

from bisup_lightning.model.block import build_layer
from bisup_lightning.model.blockwise import Positions
from bisup_lightning.model.family import Family
from tests import reference

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": {"model_type": "llama"},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4},  # no grouped queries
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1},  # biases of q, k, v
    "qwen3": {"model_type": "qwen3", "head_dim": 8},  # norms of q, k; 4 heads of 8 make 32, not 24
}


def family_of(kind):
    """The Family of one of KINDS."""
    return Family(AutoConfig.for_model(**{**SIZES, **KINDS[kind]}))


def shape_of(family):
    """What the reference has to know of it."""
    config = family.config
    base = config.rope_parameters["rope_theta"]
    return reference.Shape(
        config.num_attention_heads, config.num_key_value_heads, family.head_dim, config.rms_norm_eps, base
    )


def random_tensors(family, seed, dtype=torch.float64):
    """Tensors of a block that keep an activation's size, with norms off one, biases off zero and a loud channel."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in family.layer_shapes(0).items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            tensor = 1 + 0.2 * tensor
        elif name.endswith("bias"):
            tensor = 0.3 * tensor
        else:
            tensor = tensor * shape[1] ** -0.5
        tensors[name] = tensor.to(dtype)
    tensors["input_layernorm.weight"][3] *= 6
    return tensors


def random_hidden(seed, batch, length, width, dtype=torch.float64):
    """Hidden states [B, T, D]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


def random_prompt(seed, family, length, dtype=torch.float64):
    """Keys and values [H, P, d] of a prompt."""
    generator = torch.Generator().manual_seed(2000 + seed)
    shape = family.num_kv_heads, length, family.head_dim
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "kv")


def positions_of(family, length, prompt_length, dtype):
    """Positions from the formulas, exact in the dtype: transformers computes angles in float32 only."""
    shape, one = shape_of(family), torch.eye(family.head_dim, dtype=torch.float64)
    cos, sin = [], []
    for t in range(prompt_length, prompt_length + length):
        turned = reference.rope(one, t, shape.rope_base)
        half = family.head_dim // 2
        cos.append(turned.diagonal())
        sin.append(torch.cat([turned.diagonal(half), turned.diagonal(half)]))
    query = torch.arange(prompt_length, prompt_length + length).unsqueeze(1)
    mask = None if prompt_length == 0 else (torch.arange(prompt_length + length) <= query)[None, None]
    return Positions((torch.stack(cos)[None].to(dtype), torch.stack(sin)[None].to(dtype)), mask)


def full_precision_layer(family, tensors, exact_norms=False):
    """The block around the tensors; `exact_norms` puts torch's RMSNorm in, as transformers' own computes in float32."""
    layer = build_layer(family, 0, tensors)
    if exact_norms:
        for name, norm in [(name, module) for name, module in layer.named_modules() if name.endswith("norm")]:
            exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon, dtype=norm.weight.dtype)
            exact.load_state_dict({"weight": norm.weight})
            layer.set_submodule(name, exact.requires_grad_(False))
    return layer
