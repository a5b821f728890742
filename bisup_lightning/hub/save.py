"""Assembles the finished blocks into a folder that transformers loads."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from bisup_lightning.files import write_json, write_tensors
from bisup_lightning.hub.quantizer import BisupConfig
from bisup_lightning.model.blockwise import PROMPT, BlockwiseModel
from bisup_lightning.model.checkpoint import INDEX
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD
from bisup_lightning.quant.spec import Precision

SHARED = "model-shared.safetensors"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizer, generation settings, chat template


def save_model(
    folder: Path,
    fp: BlockwiseModel,
    blocks: Sequence[Path],
    precision: Precision,
    prompt_ids: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Publish the quantized model, by rename.

    Args:
        folder: Where it shall lie.
        fp: The full-precision model, for its shared tensors, configuration and tokenizer.
        blocks: The safetensors file of each block, in order; linked, not copied, where the file system can.
        precision: The quantizers.
        prompt_ids: The high-precision prompt; its keys and values lie in the blocks.
        dtype: What the model computes in when loaded. Tensors are stored in the checkpoint's own dtype.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shared = fp.checkpoint.read(name for name in (EMBEDDING, FINAL_NORM, HEAD) if name in fp.checkpoint)
    if prompt_ids:
        shared[PROMPT + "ids"] = torch.tensor(list(prompt_ids))
    write_tensors(temporary / SHARED, shared)
    shard_of = dict.fromkeys(shared, SHARED)
    for index, block in enumerate(blocks):
        shard = f"model-{index:05d}.safetensors"
        _link_or_copy(block, temporary / shard)
        with safe_open(block, framework="pt") as file:
            shard_of |= dict.fromkeys(file.keys(), shard)
    size = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))
    write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": shard_of})
    source = fp.checkpoint.folder
    for pattern in BESIDE_WEIGHTS:
        for path in sorted(source.glob(pattern)):
            if path.name not in ("config.json", INDEX):
                shutil.copyfile(path, temporary / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = BisupConfig.of(precision, len(prompt_ids)).to_dict()
    write_json(temporary / "config.json", config)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
