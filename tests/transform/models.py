"""Small models of every family in every awkward shape, and their blocks."""

import torch

from bisup_lightning.model.block import quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.family import linear_inputs
from bisup_lightning.model.kv import BlockKV
from tests.model.tiny import full_precision_layer

CPU = torch.device("cpu")
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
MODELS = {
    "llama": ("llama", {}),
    "llama, a key for each query": ("llama", {"num_key_value_heads": 4}),
    "llama, tied, biases everywhere": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, hidden 60, heads of 10": ("llama", {"hidden_size": 60, "intermediate_size": 90, **SIX_HEADS}),
    "llama, sharded": ("llama", {"max_shard_size": "30KB"}),
    "llama, stored bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "mistral, seven heads, window": (
        "mistral",
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "sliding_window": 8},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, six heads": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 96, **SIX_HEADS}),
    "qwen3, heads of 80": ("qwen3", {"head_dim": 80}),
    "qwen3, tied, hidden 40, six heads of 16": (
        "qwen3",
        {"tie_word_embeddings": True, "hidden_size": 40, "intermediate_size": 104, "head_dim": 16, **SIX_HEADS},
    ),
}


def tokens(length=24, batch=2):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(0))


def exact_layer(model, index):
    """Block `index` in float64 throughout, its norms too."""
    return full_precision_layer(model.family, model.layer_tensors(index), exact_norms=True)


def hidden_states(model, dtype=torch.float64, length=12, loud=None):
    """Random hidden states [2, T, D]; channel `loud` forty times louder."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, length, model.family.hidden_size, generator=generator, dtype=torch.float64)
    if loud is not None:
        x[..., loud] *= 40
    return x.to(dtype)


@torch.no_grad()
def run(model, layer, x, index=0, kv=None):
    """Block `index` without a prompt."""
    return run_layer(layer, x, model.positions(index, x.shape[1], 0), kv or BlockKV())


def unrounded(model, index, scheme, orders=None):
    """The quantized block with all that it arranges at run time, but nothing rounded; float64."""
    layer = exact_layer(model, index)
    quantize_layer(layer, scheme, model.family.config, 1.0, torch.float64, orders)
    for entry, linears in linear_inputs(layer):
        for name, linear in zip(entry.linears, linears, strict=True):
            layer.set_submodule(name, linear.unquantized())
    return layer


def relative(got, wanted):
    """‖got − wanted‖ / ‖wanted‖."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def blockwise(folder, dtype=torch.float32, transform=None):
    """The model, or what a transform makes of it."""
    plain = BlockwiseModel(folder, CPU, dtype)
    if transform is None:
        return plain
    return BlockwiseModel(folder, CPU, dtype, checkpoint=transform.checkpoint(plain.checkpoint, plain.family, CPU))
