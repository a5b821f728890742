"""Writes a random Llama checkpoint of a known model's shape, or its first blocks, to measure speed and memory on.

    python -m benchmarks.synthetic --shape 8b --blocks 8 --folder /tmp/llama-8b

A few channels of every norm are strong, as in trained models, so that activations have outliers. The tokenizer is the
bundled model's, and so, unless asked otherwise, is the size of the vocabulary.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD, Family, layer_prefix

DEMO = Path(__file__).parent.parent / "assets" / "demo"


class Shape(NamedTuple):
    """Sizes of a Llama model.

    Args:
        hidden: Channels of the hidden state.
        mlp: Channels inside the MLP.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        blocks: Decoder layers.
    """

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    blocks: int


SHAPES = {
    "tiny": Shape(128, 384, 4, 2, 2),
    "1b": Shape(2048, 8192, 32, 8, 16),
    "8b": Shape(4096, 14336, 32, 8, 32),
    "32b": Shape(5120, 27648, 40, 8, 64),
    "70b": Shape(8192, 28672, 64, 8, 80),
}
SEQUENCES, LENGTH, EPOCHS = 128, 2048, 5  # of configs/base.yaml, and of BiSup by default; a length is in tokens

# The cost of calibration, in forward passes of a block over the text. An epoch is a forward pass and a backward pass,
# which has two products (gradients of inputs and of weights) for each one of the former. The least that a block costs
# is one pass for the full-precision outputs that it learns, the epochs, and one pass for the quantized outputs that the
# next block gets. The loss at the start is one more, which training does not need: it is not in the floor.
EPOCH_PASSES = 3
FLOOR_PASSES = 1 + EPOCHS * EPOCH_PASSES + 1  # 17

STRONG = 16  # channels of each norm


def write_checkpoint(
    folder: Path,
    name: str,
    num_blocks: int | None = None,
    vocab_size: int = 8192,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write config.json, tokenizer and one safetensors shard for each block, of the shape that has this name."""
    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=num_blocks or shape.blocks, vocab_size=vocab_size,
        rope_theta=5e5, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1,
        dtype=str(dtype).removeprefix("torch."), architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder / file)
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, size: torch.Size) -> torch.Tensor:
        if "norm" in name:
            weight = 1 + 0.1 * torch.randn(size, generator=generator, device=device)
            weight[torch.randint(len(weight), (STRONG,), generator=generator, device=device)] *= 20
        else:
            weight = torch.randn(size, generator=generator, device=device) * (2 * size[1]) ** -0.5
        return weight.to(dtype).cpu()

    shapes, weight_map = Family(config).layer_shapes(0), {}
    shared = {name: torch.Size([vocab_size, shape.hidden]) for name in (EMBEDDING, HEAD)}
    shared[FINAL_NORM] = torch.Size([shape.hidden])
    shards = {"model-shared.safetensors": shared}
    for index in range(config.num_hidden_layers):
        block = {layer_prefix(index) + name: size for name, size in shapes.items()}
        shards[f"model-{index:05d}.safetensors"] = block
    for shard, sizes in shards.items():
        save_file({name: draw(name, size) for name, size in sizes.items()}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sizes, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_text(folder: Path) -> Path:
    """Write a text that is long enough for `SEQUENCES` of `LENGTH`."""
    text = folder / "text.txt"
    text.write_text(" ".join(str(number) for number in range(400_000)), encoding="utf-8")
    return text


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, help="the first blocks only")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_checkpoint(given.folder, given.shape, given.blocks, given.vocab, device)


if __name__ == "__main__":
    main()
