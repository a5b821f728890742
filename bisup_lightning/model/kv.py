"""Keys and values: the prompt's stay at high precision and stand in front, the rest is quantized (paper §4.5).

A decoder layer hands its keys (after RoPE) and values to `update(k, v, layer_idx)` of its cache; whatever has that
method decides what attention sees. Shape suffixes: B sequences, H key/value heads, T tokens, P prompt tokens,
d head dimension, L layers.
"""

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from bisup_lightning.quant.affine import fake_quantize
from bisup_lightning.quant.hadamard import apply_hadamard, hadamard_factors
from bisup_lightning.quant.spec import QuantSpec, Scheme

KeyValue = tuple[Tensor, Tensor]


class KVQuantizer:
    """Quantizes keys and values.

    Args:
        spec: One scale for each head of a token (`head`) or for each token (`token`); None leaves them as they are.
        hadamard: Round keys in a basis rotated within each head, and rotate back: k ↦ ⟨kH⟩Hᵀ, so that queries need no
            rotation of their own (QuaRot).
    """

    def __init__(self, spec: QuantSpec | None, hadamard: bool = False) -> None:
        self.spec, self.hadamard = spec, hadamard
        self.factors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, scheme: Scheme) -> "KVQuantizer":
        """The scheme's quantizer of keys and values."""
        return cls(scheme.kv, scheme.hadamard)

    def __call__(self, k_BHTd: Tensor, v_BHTd: Tensor) -> KeyValue:
        """⟨k⟩ and ⟨v⟩."""
        if self.spec is None:
            return k_BHTd, v_BHTd
        if not self.hadamard:
            return self._quantize(k_BHTd, self.spec), self._quantize(v_BHTd, self.spec)
        if not self.factors or self.factors[0].device != k_BHTd.device:
            self.prepare(k_BHTd.shape[-1], k_BHTd.device)
        k_BHTd = self._quantize(apply_hadamard(k_BHTd, self.factors), self.spec)
        return apply_hadamard(k_BHTd, self.factors, transpose=True), self._quantize(v_BHTd, self.spec)

    def prepare(self, head_dim: int, device: torch.device) -> "KVQuantizer":
        """Have the rotation at hand before the first call: a compiled one can't read its tables."""
        if self.hadamard:
            self.factors = hadamard_factors(head_dim, device=device)
        return self

    @staticmethod
    def _quantize(x_BHTd: Tensor, spec: QuantSpec) -> Tensor:
        if spec.granularity == "head":
            return fake_quantize(x_BHTd, spec)
        x_BTi = x_BHTd.transpose(1, 2).flatten(2)
        return fake_quantize(x_BTi, spec).unflatten(-1, (x_BHTd.shape[1], -1)).transpose(1, 2)


class BlockKV:
    """Stands in for the cache of one block over whole sequences: prompt in front, the rest quantized, nothing kept.

    Args:
        quantizer: Quantizer of keys and values; None leaves them as they are.
        prompt: The prompt's keys and values, [H, P, d] each, or None.
    """

    def __init__(self, quantizer: KVQuantizer | None = None, prompt: KeyValue | None = None) -> None:
        self.quantizer, self.prompt = quantizer or KVQuantizer(None), prompt

    def update(self, k_BHTd: Tensor, v_BHTd: Tensor, layer_idx: int, *args: object, **kwargs: object) -> KeyValue:
        """Keys and values [B, H, P + T, d] that attention reads."""
        k_BHTd, v_BHTd = self.quantizer(k_BHTd, v_BHTd)
        if self.prompt is None:
            return k_BHTd, v_BHTd
        k_HPd, v_HPd = self.prompt
        return _in_front(k_HPd, k_BHTd), _in_front(v_HPd, v_BHTd)

    def copy(self) -> "BlockKV":
        """The same with its own copy of the prompt's tensors."""
        return BlockKV(
            self.quantizer, None if self.prompt is None else (self.prompt[0].clone(), self.prompt[1].clone())
        )


class KVRecorder:
    """Keeps the keys and values that a block makes of the prompt itself."""

    def __init__(self) -> None:
        self.recorded: KeyValue | None = None

    def update(self, k_1HPd: Tensor, v_1HPd: Tensor, layer_idx: int, *args: object, **kwargs: object) -> KeyValue:
        """Pass through, remembering."""
        self.recorded = (k_1HPd[0].detach().clone(), v_1HPd[0].detach().clone())
        return k_1HPd, v_1HPd


class PromptKV(nn.Module):
    """The prompt's token ids and its keys and values in every block, as part of a saved model.

    Args:
        num_layers: L.
        num_heads: H.
        length: P.
        head_dim: d.
    """

    ids: Tensor

    def __init__(self, num_layers: int, num_heads: int, length: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.empty(length, dtype=torch.int64))
        for index in range(num_layers):
            for name in self.names(index):
                self.register_buffer(name, torch.empty(num_heads, length, head_dim))

    @staticmethod
    def names(index: int) -> tuple[str, str]:
        """What the keys and the values of block `index` are called."""
        return f"key_{index}", f"value_{index}"

    def of_layer(self, index: int) -> KeyValue:
        """Keys and values [H, P, d] of block `index`."""
        key, value = self.names(index)
        return self.get_buffer(key), self.get_buffer(value)


class PromptCacheLayer(DynamicLayer):
    """One block's growing cache for generation.

    Args:
        quantizer: Quantizer of keys and values.
        prompt: The prompt's keys and values [H, P, d], or None.

    Attributes:
        inputs_hold_prompt: Whether the first tokens that arrive are the prompt itself. Then their keys and values are
            replaced by the exact ones; otherwise these stand in front from the start.
    """

    def __init__(self, quantizer: KVQuantizer, prompt: KeyValue | None) -> None:
        super().__init__()
        self.quantizer, self.prompt, self.inputs_hold_prompt = quantizer, prompt, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KeyValue:
        """Append new keys and values [B, H, T, d], quantized; return all [B, H, P + T so far, d]."""
        k_BHTd, v_BHTd = self.quantizer(key_states, value_states)
        if not self.is_initialized and self.prompt is not None:
            k_HPd, v_HPd = self.prompt
            seen = k_HPd.shape[1] if self.inputs_hold_prompt else 0
            k_BHTd, v_BHTd = _in_front(k_HPd, k_BHTd[:, :, seen:]), _in_front(v_HPd, v_BHTd[:, :, seen:])
        return super().update(k_BHTd, v_BHTd)

    def get_seq_length(self) -> int:
        """Tokens held, the prompt's included."""
        if not self.is_initialized and self.prompt is not None and not self.inputs_hold_prompt:
            return self.prompt[0].shape[1]
        return super().get_seq_length()


class PromptCache(Cache):
    """A cache for `generate()` whose every layer is a PromptCacheLayer.

    Args:
        num_layers: L.
        quantizer: Quantizer of keys and values.
        prompt: The prompt in every block, or None.

    Attributes:
        tokens_in_front: P, or 0 where the inputs hold the prompt.
        own_copy_BT: True at the tokens of a row's own copy of the prompt, which its inputs hold although the prompt
            stands in front; None if no row has one.
        beginning_BT: Ids of all tokens so far, while it is unknown of some row whether it begins with the prompt; then
            None.
    """

    layers: list[PromptCacheLayer]  # type: ignore[assignment]  # of one kind

    def __init__(self, num_layers: int, quantizer: KVQuantizer, prompt: PromptKV | None) -> None:
        prompts = [None if prompt is None else prompt.of_layer(index) for index in range(num_layers)]
        super().__init__(layers=[PromptCacheLayer(quantizer, prompt) for prompt in prompts])
        self.length = 0 if prompt is None else len(prompt.ids)
        self.begin(None, inputs_hold_prompt=False)

    def begin(self, ids_BT: Tensor | None, inputs_hold_prompt: bool) -> None:
        """Before the first tokens of a text.

        Args:
            ids_BT: Their ids, if rows' own copies of the prompt are to be found among them; else None.
            inputs_hold_prompt: See PromptCacheLayer.
        """
        for layer in self.layers:
            layer.inputs_hold_prompt = inputs_hold_prompt
        self.tokens_in_front = 0 if inputs_hold_prompt else self.length
        self.own_copy_BT: Tensor | None = None
        self.beginning_BT: Tensor | None = None if ids_BT is None else ids_BT[:, :0]


def _in_front(prompt_HPd: Tensor, x_BHTd: Tensor) -> Tensor:
    prompt = prompt_HPd.to(x_BHTd).expand(x_BHTd.shape[0], -1, -1, -1)
    return torch.cat([prompt, x_BHTd], dim=2)
