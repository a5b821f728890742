"""Runs a model block by block, so that no more than one block is ever in memory.

Shape suffixes: B sequences, T tokens, D hidden size, P prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bisup_lightning.errors import UserError
from bisup_lightning.model.attention import FUSED_CAUSAL
from bisup_lightning.model.block import build_layer, hold_dense, is_quantizers, pack_layer
from bisup_lightning.model.checkpoint import Checkpoint
from bisup_lightning.model.family import CACHE, EMBEDDING, FINAL_NORM, Family, attention_half, mlp_half
from bisup_lightning.model.kv import BlockKV, KeyValue, KVQuantizer, KVRecorder, PromptKV
from bisup_lightning.quant.compiled import compiled_on_gpu
from bisup_lightning.quant.spec import Scheme

PROMPT = "prompt_kv."  # what the names of a saved prompt's tensors begin with


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a batch stand and what they may see; the same for all batches of one shape.

    Args:
        rotary: (cos, sin), [1, T, d] each, for positions P … P+T−1.
        mask: Boolean [1, 1, T, P+T], true where a token may look; None means plain causal attention.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None


def run_layer(layer: nn.Module, hidden_BTD: Tensor, positions: Positions, kv: BlockKV | KVRecorder) -> Tensor:
    """Hidden states after one decoder layer, [B, T, D]."""
    return layer(hidden_BTD, attention_mask=positions.mask, position_embeddings=positions.rotary, **{CACHE: kv})


def run_layer_in_halves(layer: nn.Module, hidden_BTD: Tensor, positions: Positions, kv: BlockKV) -> Tensor:
    """As `run_layer`, but the backward pass recomputes one half of the layer at a time, and holds no more in memory."""
    seen: dict[str, Any] = {"attention_mask": positions.mask, "position_embeddings": positions.rotary, CACHE: kv}
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here draws random numbers
    hidden_BTD = checkpoint(attention_half, layer, hidden_BTD, **seen, **again)
    return checkpoint(mlp_half, layer, hidden_BTD, **again)


@compiled_on_gpu(dynamic=False)
def run_layer_fast(layer: nn.Module, hidden_BTD: Tensor, positions: Positions, kv: BlockKV) -> Tensor:
    """As `run_layer`; on a GPU through one graph for all blocks, whose last digits may differ."""
    return run_layer(layer, hidden_BTD, positions, kv)


class ExactPrompt:
    """The keys and values of a prompt in one block after another, for a walk over all blocks in order.

    Args:
        model: Full-precision, then it encodes the prompt as the walk goes; or quantized with a stored prompt, which
            replaces the named one.
        prompt_ids: Token ids of the prompt; empty for none.
    """

    def __init__(self, model: "BlockwiseModel", prompt_ids: Sequence[int]) -> None:
        self.model, self.length = model, len(prompt_ids)
        self.stored = model.stored_prompt() if prompt_ids else None
        self.hidden_1PD = model.embed(torch.tensor([list(prompt_ids)]).long())

    def block_kv(self, index: int, layer: nn.Module) -> BlockKV:
        """The cache that block `index` runs with: the exact prompt in front, what follows quantized as in the model.

        Call it once for each block, in order: a full-precision model encodes the prompt block by block.
        """
        return BlockKV(self.model.kv_quantizer, self._key_value(index, layer))

    def _key_value(self, index: int, layer: nn.Module) -> KeyValue | None:
        """The prompt's keys and values [H, P, d] in block `index`, or None without a prompt."""
        if not self.length:
            return None
        if self.stored is not None:
            return self.stored.of_layer(index)
        self.hidden_1PD, kept = self.model.encode_prompt(index, layer, self.hidden_1PD)
        return kept


class BlockwiseModel:
    """A checkpoint, full-precision or quantized by this package, computed one block at a time.

    Args:
        folder: Its folder (see `checkpoint.resolve`).
        device: Where blocks compute.
        dtype: What they compute in; None for the dtype that the configuration names.
        scheme: The quantizers if the folder holds a quantized model, else None.
        checkpoint: What to read instead of the folder's own tensors: the same model, transformed.
        fused_attention: Whether attention behind a prompt runs on a fused kernel. Its last digits differ from those of
            the model as transformers loads it.

    Attributes:
        kv_quantizer: Quantizer of keys and values; a full-precision model's leaves them as they are.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype | None = None,
        scheme: Scheme | None = None,
        checkpoint: Checkpoint | None = None,
        fused_attention: bool = False,
    ) -> None:
        self.fused_attention = fused_attention
        self.checkpoint = checkpoint or Checkpoint(folder)
        attention = FUSED_CAUSAL if fused_attention else "sdpa"
        self.family = Family.of_folder(str(folder), self.checkpoint.num_layers, attention)
        self.device, self.scheme = device, scheme
        self.kv_quantizer = KVQuantizer(None) if scheme is None else KVQuantizer.of(scheme)
        if scheme is None:
            if self.family.quantizer is not None:
                raise UserError(
                    f"checkpoint: {folder}/config.json has a quantization_config ({self.family.quantizer}): the model "
                    "is quantized already; give the full-precision one"
                )
            self.checkpoint.check(self.family.shapes())
        self.storage_dtype = self.checkpoint.dtype()
        configured = cast(torch.dtype | None, self.family.config.dtype)  # transformers resolves its name
        self.dtype = dtype or configured or torch.float32
        self._rotary = self.family.rotary().to(device)
        self._positions = lru_cache(maxsize=8)(self._make_positions)

    @property
    def num_layers(self) -> int:
        """How many blocks there are."""
        return self.family.num_layers

    @property
    def head_name(self) -> str:
        """The name of the output projection's tensor: the embedding's, where the two are tied."""
        return self.checkpoint.head_name(self.family.tied)

    def embed(self, ids_BT: Tensor, out: Tensor | None = None) -> Tensor:
        """Embeddings [B, T, D] of token ids, on the CPU (in `out`, if given), in the dtype that blocks compute in."""
        table_VD = self.checkpoint.read_shared(EMBEDDING, torch.device("cpu"), self.dtype)
        if out is None:
            return nn.functional.embedding(ids_BT.cpu(), table_VD)
        torch.index_select(table_VD, 0, ids_BT.cpu().flatten(), out=out.view(-1, table_VD.shape[1]))
        return out

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` on the device; floats in the dtype that blocks compute in."""
        return self.checkpoint.read_layer(index, self.device, self.dtype)

    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Block `index`, ready to run."""
        tensors = self.layer_tensors(index) if tensors is None else tensors
        if self.scheme is None:
            return build_layer(self.family, index, tensors)
        return self.packed_layer(index, tensors, self.scheme)

    def packed_layer(self, index: int, tensors: Mapping[str, Tensor], scheme: Scheme) -> nn.Module:
        """Block `index` around the tensors that a fused block stores, ready to run.

        What belongs to quantizers is in float32, in which they compute, as in the block when it was fused.
        """
        layer = pack_layer(self.family.empty_layer(index), scheme, self.family.config)
        layer.load_state_dict(
            {
                name: tensor.to(torch.float32 if is_quantizers(name) else self.dtype)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in tensors.items()
            },
            assign=True,
        )
        return layer.requires_grad_(False)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """All blocks in order, one at a time; packed weights are dequantized once, for several passes through each."""
        for index in range(self.num_layers):
            yield index, hold_dense(self.layer(index), self.dtype)

    def stored_prompt(self) -> PromptKV | None:
        """The prompt saved with a quantized model."""
        names = [name for name in self.checkpoint.shard_of if name.startswith(PROMPT)]
        if not names:
            return None
        tensors = {name.removeprefix(PROMPT): tensor for name, tensor in self.checkpoint.read(names).items()}
        with torch.device("meta"):
            prompt = PromptKV(self.num_layers, self.family.num_kv_heads, len(tensors["ids"]), self.family.head_dim)
        prompt.load_state_dict(tensors, assign=True)
        return prompt.to(self.device, self.dtype)

    def positions(self, index: int, length: int, prompt_length: int) -> Positions:
        """Where `length` tokens behind `prompt_length` prompt tokens stand, for block `index`."""
        return self._positions(self.family.sliding_window(index), length, prompt_length, self.dtype)

    def _make_positions(self, window: int | None, length: int, prompt_length: int, dtype: torch.dtype) -> Positions:
        query = torch.arange(prompt_length, prompt_length + length, device=self.device)
        probe = torch.empty(1, length, 1, dtype=dtype, device=self.device)
        cos, sin = self._rotary(probe, query.unsqueeze(0))
        total = prompt_length + length
        if (prompt_length == 0 or self.fused_attention) and (window is None or total <= window):
            return Positions((cos, sin), None)
        key = torch.arange(total, device=self.device)
        mask = key <= query.unsqueeze(1)
        if window is not None:
            mask &= key > query.unsqueeze(1) - window
        return Positions((cos, sin), mask[None, None])

    @torch.no_grad()
    def encode_prompt(self, index: int, layer: nn.Module, hidden_1PD: Tensor) -> tuple[Tensor, KeyValue]:
        """The prompt's hidden states after block `index`, and the keys and values that the block makes of it."""
        recorder = KVRecorder()
        positions = self.positions(index, hidden_1PD.shape[1], 0)
        hidden_1PD = run_layer(layer, hidden_1PD.to(self.device), positions, recorder)
        assert recorder.recorded is not None
        return hidden_1PD, recorder.recorded

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of a few token ids; a quantized model's behind its stored prompt."""
        stored = self.stored_prompt()
        hidden_BTD = self.embed(ids_BT).to(self.device)
        for index, layer in self.layers():
            kv = BlockKV(self.kv_quantizer, None if stored is None else stored.of_layer(index))
            positions = self.positions(index, ids_BT.shape[1], 0 if stored is None else len(stored.ids))
            hidden_BTD = run_layer(layer, hidden_BTD, positions, kv)
        return self.head()(hidden_BTD)

    def head(self) -> nn.Module:
        """Final norm and output projection: hidden states [..., D] to logits [..., V]."""
        norm = self.family.final_norm(self.checkpoint.read_shared(FINAL_NORM, self.device, self.dtype))
        weight_VD = self.checkpoint.read_shared(self.head_name, self.device, self.dtype)
        projection = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
        projection.load_state_dict({"weight": weight_VD}, assign=True)
        return nn.Sequential(norm, projection).requires_grad_(False)
