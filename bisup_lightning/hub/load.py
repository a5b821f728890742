"""Loads models behind a prompt: a quantized one behind its own, full precision to compare it with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from bisup_lightning.hub.quantizer import BisupConfig, StandBehindPrompt, keep_cache_only_if_asked
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.family import CACHE, decoder, head_dim
from bisup_lightning.model.kv import KVQuantizer, PromptKV
from bisup_lightning.model.whole import load_whole_model


@torch.no_grad()
def load_behind_prompt(
    folder: Path, prompt_ids: Sequence[int], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The whole model in memory; with a prompt, its keys and values stand in front of every input.

    Args:
        folder: The checkpoint's folder.
        prompt_ids: Token ids of the prompt; empty for the plain model.
        dtype: What it computes in.
        device: Where.
    """
    model = load_whole_model(folder, device, dtype)
    if not prompt_ids:
        return model
    body, config = decoder(model), model.config
    ids_1P = torch.tensor([list(prompt_ids)], device=device)
    cache: Any = DynamicCache()  # of full length, also where a block has a window
    body(input_ids=ids_1P, use_cache=True, **{CACHE: cache})
    kept = PromptKV(config.num_hidden_layers, config.num_key_value_heads, len(prompt_ids), head_dim(config))
    kept.ids.copy_(ids_1P[0])
    for index, layer in enumerate(cache.layers):
        for name, states_1HPd in zip(kept.names(index), (layer.keys, layer.values), strict=True):
            kept.register_buffer(name, states_1HPd[0].clone())
    model.prompt_kv = kept
    body.register_forward_pre_hook(StandBehindPrompt(model, KVQuantizer(None)), with_kwargs=True)
    body.register_forward_hook(keep_cache_only_if_asked, with_kwargs=True)
    return model


def open_quantized(folder: Path, device: torch.device) -> BlockwiseModel:
    """A run's `model/` folder, to be computed block by block."""
    return BlockwiseModel(folder, device, scheme=BisupConfig.of_folder(folder).read_scheme())


def load_quantized(folder: Path, device: torch.device) -> PreTrainedModel:
    """A run's `model/`, behind the prompt that it was saved with."""
    return load_whole_model(folder, device)
