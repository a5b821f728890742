"""Loads a whole model into memory, for what cannot run block by block: generation and lm-eval."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bisup_lightning.errors import UserError
from bisup_lightning.model.checkpoint import INDEX, Checkpoint


def load_whole_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A checkpoint as transformers loads it, from safetensors alone and without code of its own, ready to run.

    Args:
        folder: A folder from `checkpoint.resolve`, or a run's `model/`.
        device: Where it computes.
        dtype: What it computes in; None for the dtype that its configuration names.

    Raises:
        UserError: If the folder holds no safetensors, or its index names a shard that is none: transformers would
            unpickle that one, whatever `use_safetensors` says.
    """
    for shard in Checkpoint(folder).shards:
        if shard.suffix != ".safetensors":
            raise UserError(f"checkpoint: {folder / INDEX} names {shard.name}, which is no safetensors file")
    wanted = dtype or "auto"  # a None would replace what the configuration names
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=wanted, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device).eval()
