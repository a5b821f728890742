"""The quantizer "bisup" of transformers: lets `AutoModelForCausalLM.from_pretrained` load a run's `model/` folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bisup_lightning.model.block import pack_layer
from bisup_lightning.model.family import CACHE, decoder, decoder_layers, head_dim
from bisup_lightning.model.kv import KVQuantizer, PromptCache, PromptKV
from bisup_lightning.quant.spec import QuantSpec, Scheme

METHOD = "bisup"


@register_quantization_config(METHOD)
class BisupConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a saved model's config.json.

    Args:
        scheme: Fields of the Scheme.
        prompt_length: Number of tokens P in the high-precision prompt.
    """

    def __init__(self, scheme: dict[str, Any], prompt_length: int = 0, **kwargs: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # annotated for transformers' own methods alone
        self.scheme, self.prompt_length = scheme, prompt_length

    @classmethod
    def of(cls, scheme: Scheme, prompt_length: int) -> "BisupConfig":
        """The configuration of a model quantized so."""
        return cls(asdict(scheme), prompt_length)

    @classmethod
    def of_folder(cls, folder: Path) -> "BisupConfig":
        """The configuration in a saved model's folder."""
        return cls(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])

    def read_scheme(self) -> Scheme:
        """The quantizers."""
        specs = {
            place: None if self.scheme[place] is None else QuantSpec(**self.scheme[place])
            for place in ("weights", "activations", "kv")
        }
        return Scheme(**{**self.scheme, **specs})


@register_quantizer(METHOD)
class BisupQuantizer(HfQuantizer):
    """Gives a model packed linears and quantizing norms before its weights are loaded, and the prompt's cache after."""

    requires_calibration = True
    quantization_config: BisupConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for layer in decoder_layers(model):
            pack_layer(layer, self.quantization_config.read_scheme(), model.config)
        if length := self.quantization_config.prompt_length:
            config = model.config
            model.prompt_kv = PromptKV(config.num_hidden_layers, config.num_key_value_heads, length, head_dim(config))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        stand_behind_prompt = StandBehindPrompt(model, KVQuantizer.of(self.quantization_config.read_scheme()))
        decoder(model).register_forward_pre_hook(stand_behind_prompt, with_kwargs=True)
        decoder(model).register_forward_hook(keep_cache_only_if_asked, with_kwargs=True)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` gives a folder that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained further."""
        return False


def keep_cache_only_if_asked(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Without `use_cache`, the cache served one forward pass alone."""
    if kwargs.get("use_cache") is False:
        setattr(output, CACHE, None)


class StandBehindPrompt:
    """Puts the quantizing cache with the prompt in front wherever a forward pass starts without one.

    Inputs may begin with the prompt's own tokens (what a tokenizer adds, or a chat template). If all do, and none is
    padded, they stay as they are, and the exact keys and values replace those that the quantized blocks make of these
    tokens. Otherwise all stand behind the exact prompt, and where a row of a batch with an attention mask brings it
    along, its copy is masked out.

    Args:
        model: The loaded model.
        kv: Quantizer of keys and values.
    """

    def __init__(self, model: PreTrainedModel, kv: KVQuantizer) -> None:
        self.num_layers, self.kv = model.config.num_hidden_layers, kv
        self.prompt: PromptKV | None = getattr(model, "prompt_kv", None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments with which the decoder runs."""
        if args:  # transformers calls its decoders with keywords
            kwargs = {"input_ids": args[0], **kwargs}
        cache, mask_BT = kwargs.get(CACHE), kwargs.get("attention_mask")
        if mask_BT is not None and mask_BT.ndim != 2:
            raise ValueError("a bisup model takes attention masks of shape [batch, tokens] only")
        if not isinstance(cache, PromptCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("a bisup model needs its own cache: pass none, or the one that it returned")
            cache = self._new_cache(kwargs.get("input_ids"), mask_BT)
        kwargs[CACHE] = cache
        if cache.tokens_in_front:
            self._stand_behind(kwargs, cache)
        return (), kwargs

    def _new_cache(self, ids_BT: Tensor | None, mask_BT: Tensor | None) -> PromptCache:
        if self.prompt is None or ids_BT is None or ids_BT.shape[1] < len(self.prompt.ids):
            return PromptCache(self.num_layers, self.kv, self.prompt)
        prompt_P = self.prompt.ids.to(ids_BT.device)
        column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        first_B1 = ids_BT.new_zeros(len(ids_BT), 1) if mask_BT is None else mask_BT.int().argmax(1, keepdim=True)
        columns_BP = (first_B1 + column_T[: len(prompt_P)]).clamp_max(ids_BT.shape[1] - 1)
        holds_B1 = (ids_BT.gather(1, columns_BP) == prompt_P).all(1, keepdim=True)
        if bool(holds_B1.all()) and not bool(first_B1.any()):
            return PromptCache(self.num_layers, self.kv, self.prompt, inputs_hold_prompt=True)
        cache = PromptCache(self.num_layers, self.kv, self.prompt)
        if mask_BT is not None and bool(holds_B1.any()):
            cache.own_copy_BT = holds_B1 & (column_T >= first_B1) & (column_T < first_B1 + len(prompt_P))
        return cache

    @staticmethod
    def _stand_behind(kwargs: dict[str, Any], cache: PromptCache) -> None:
        """Positions start at P, or at P behind a row's own copy; masks count the prompt, and not such a copy."""
        length, copy_BT = cache.tokens_in_front, cache.own_copy_BT
        positions_BT, mask_BT = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if copy_BT is not None:
            rows, new = kwargs["input_ids"].shape
            total = cache.get_seq_length() - length + new
            if positions_BT is None:
                positions_BT = torch.arange(total - new, total, device=copy_BT.device).expand(rows, -1)
            mask_BT = copy_BT.new_ones(rows, total, dtype=torch.long) if mask_BT is None else mask_BT.clone()
            mask_BT[:, : copy_BT.shape[1]].masked_fill_(copy_BT, 0)
        if positions_BT is not None:
            held = 0 if copy_BT is None else copy_BT.sum(1, keepdim=True)
            kwargs["position_ids"] = (positions_BT + length - held).clamp_min(0)
        if mask_BT is not None:
            kwargs["attention_mask"] = torch.cat([mask_BT.new_ones(mask_BT.shape[0], length), mask_BT], dim=1)
