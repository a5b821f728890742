"""Assembles the finished blocks into a folder that transformers loads."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bisup_lightning.files import publish, sync, write_json, write_tensors, write_text
from bisup_lightning.hub.audit import audit, block_shard
from bisup_lightning.hub.card import CARD
from bisup_lightning.hub.quantizer import BisupConfig
from bisup_lightning.model.blockwise import PROMPT, BlockwiseModel
from bisup_lightning.model.checkpoint import INDEX
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM
from bisup_lightning.quant.spec import Scheme

SHARED = "model-shared.safetensors"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizer, generation settings, chat template


def save_model(
    folder: Path,
    fp: BlockwiseModel,
    blocks: Mapping[Path, str],
    scheme: Scheme,
    prompt_ids: Sequence[int],
    dtype: torch.dtype,
    probe_BT: Tensor,
    card: str,
) -> None:
    """Publish the quantized model, by rename, once it has passed its audit.

    Args:
        folder: Where it shall lie.
        fp: The full-precision model, for its shared tensors, configuration and tokenizer.
        blocks: SHA-256 of each block's safetensors file, by file, in order; linked, not copied, where the file system
            can.
        scheme: The quantizers.
        prompt_ids: The high-precision prompt; its keys and values lie in the blocks.
        dtype: What the model computes in when loaded. Tensors are stored in the checkpoint's own dtype.
        probe_BT: A few token ids [B, T] that it must compute finite logits for.
        card: Its model card.

    Raises:
        AuditError: If it does not pass; nothing is published.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    head = fp.head_name
    cpu, storage = torch.device("cpu"), fp.storage_dtype
    shared = {name: fp.checkpoint.read_shared(name, cpu, storage) for name in sorted({EMBEDDING, FINAL_NORM, head})}
    if prompt_ids:
        shared[PROMPT + "ids"] = torch.tensor(list(prompt_ids))
    write_tensors(temporary / SHARED, shared)
    shard_of = dict.fromkeys(shared, SHARED)
    for index, block in enumerate(blocks):
        shard = block_shard(index)
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
    config["tie_word_embeddings"] = head == EMBEDDING
    config["quantization_config"] = BisupConfig.of(scheme, len(prompt_ids)).to_dict()
    write_json(temporary / "config.json", config)
    write_text(temporary / CARD, card)
    audit(temporary, list(blocks.values()), probe_BT, fp.device)
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    publish(temporary, folder)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
