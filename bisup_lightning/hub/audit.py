"""What a quantized model's folder must be before it is published."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bisup_lightning.errors import UserError
from bisup_lightning.files import sha256
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.hub.quantizer import BisupConfig
from bisup_lightning.model.block import pack_layer
from bisup_lightning.model.blockwise import PROMPT, BlockwiseModel
from bisup_lightning.model.checkpoint import header
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, layer_prefix
from bisup_lightning.model.kv import PromptKV

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


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
        OSError: If a file can't be read for another reason than that it is missing.
    """
    try:
        for index, digest in enumerate(digests):
            if sha256(folder / block_shard(index)) != digest:
                raise AuditError(f"{folder / block_shard(index)} is not the block that was calibrated")
        model = open_quantized(folder, device)
        _audit_tensors(folder, model)
        finite = model.logits(probe_BT).isfinite().all()
    except (FileNotFoundError, UserError, ValueError, KeyError) as error:
        raise AuditError(f"{folder} can't be loaded: {error}") from error
    if not finite:
        raise AuditError(f"{folder} computes logits that are not finite")


def _audit_tensors(folder: Path, model: BlockwiseModel) -> None:
    """Compare what lies in the files, whatever the index says of it, with what should."""
    wanted = expected_tensors(model, BisupConfig.of_folder(folder))
    stored: dict[str, tuple[torch.Size, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: header(file, name) for name in file.keys()}  # noqa: SIM118  no dictionary
    for name in sorted(stored.keys() ^ wanted.keys()):
        raise AuditError(f"{folder} has {'a superfluous' if name in stored else 'no'} tensor {name}")
    for name, (shape, dtype) in stored.items():
        if shape != wanted[name].shape or dtype != _dtype_name(wanted[name], model.storage_dtype):
            raise AuditError(f"{folder}: {name} is {dtype} of shape {list(shape)}")


def _dtype_name(tensor: Tensor, storage: torch.dtype) -> str:
    """What safetensors calls a tensor's dtype; floats are stored in the checkpoint's own."""
    return DTYPES[storage if tensor.is_floating_point() else tensor.dtype]


def expected_tensors(model: BlockwiseModel, config: BisupConfig) -> dict[str, Tensor]:
    """Every tensor that a quantized model holds, by name, on the meta device."""
    family, scheme = model.family, config.read_scheme()
    with torch.device("meta"):
        vocabulary = torch.empty(family.vocab_size, family.hidden_size)
        tensors = {FINAL_NORM: torch.empty(family.hidden_size), EMBEDDING: vocabulary}
        prompt = PromptKV(family.num_layers, family.num_kv_heads, config.prompt_length, family.head_dim)
    tensors[model.head_name] = vocabulary
    for index in range(family.num_layers):
        layer = pack_layer(family.empty_layer(index), scheme, family.config)
        tensors |= {layer_prefix(index) + name: tensor for name, tensor in layer.state_dict().items()}
    if config.prompt_length:
        tensors |= {PROMPT + name: tensor for name, tensor in prompt.state_dict().items()}
    return tensors


def block_shard(index: int) -> str:
    """The file that holds block `index` in a quantized model's folder."""
    return f"model-{index:05d}.safetensors"
