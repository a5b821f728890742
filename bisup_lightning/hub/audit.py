"""What a quantized model's folder must be before it is published."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bisup_lightning.files import sha256
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.hub.quantizer import BisupConfig
from bisup_lightning.model.block import pack_layer
from bisup_lightning.model.blockwise import PROMPT, BlockwiseModel
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, layer_prefix
from bisup_lightning.model.kv import PromptKV


class AuditError(RuntimeError):
    """A folder is not the quantized model that it should be; the message says where."""


def audit(folder: Path, digests: Sequence[str], probe_BT: Tensor, device: torch.device) -> None:
    """See that a folder holds a whole quantized model and nothing beside it.

    Args:
        folder: The model, as transformers would load it.
        digests: SHA-256 of each block's shard, in order.
        probe_BT: A few token ids [B, T] to run the model on.
        device: Where to run it.

    Raises:
        AuditError: If a block is missing or changed, a tensor is missing, superfluous (such as a full-precision copy of
            a quantized weight) or of another shape or dtype, the configuration does not load, or a logit is not finite.
    """
    for index, digest in enumerate(digests):
        if sha256(folder / block_shard(index)) != digest:
            raise AuditError(f"{folder / block_shard(index)} is not the block that was calibrated")
    model = open_quantized(folder, device)
    wanted, checkpoint = expected_tensors(model, BisupConfig.of_folder(folder)), model.checkpoint
    if strange := sorted(checkpoint.shard_of.keys() ^ wanted.keys()):
        what = "a tensor that does not belong in it" if strange[0] in checkpoint else "no tensor"
        raise AuditError(f"{folder} has {what}: {strange[0]}")
    for name, (shape, dtype) in checkpoint.headers().items():
        if shape != wanted[name].shape or (dtype == "U8") != (wanted[name].dtype == torch.uint8):
            raise AuditError(f"{folder / checkpoint.shard_of[name]}: {name} is {dtype} of shape {list(shape)}")
    if not model.logits(probe_BT).isfinite().all():
        raise AuditError(f"{folder} computes logits that are not finite")


def expected_tensors(model: BlockwiseModel, config: BisupConfig) -> dict[str, Tensor]:
    """Every tensor that a quantized model holds, by name, on the meta device."""
    family, scheme = model.family, config.read_scheme()
    with torch.device("meta"):
        vocabulary = torch.empty(family.vocab_size, family.hidden_size)
        tensors = {FINAL_NORM: torch.empty(family.hidden_size), EMBEDDING: vocabulary}
        prompt = PromptKV(family.num_layers, family.num_kv_heads, config.prompt_length, family.head_dim)
    tensors[model.checkpoint.head_name(family.config.tie_word_embeddings)] = vocabulary
    for index in range(family.num_layers):
        layer = pack_layer(family.empty_layer(index), scheme, family.config)
        tensors |= {layer_prefix(index) + name: tensor for name, tensor in layer.state_dict().items()}
    if config.prompt_length:
        tensors |= {PROMPT + name: tensor for name, tensor in prompt.state_dict().items()}
    return tensors


def block_shard(index: int) -> str:
    """The file that holds block `index` in a quantized model's folder."""
    return f"model-{index:05d}.safetensors"
