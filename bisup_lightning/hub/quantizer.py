"""The quantizer "bisup" of transformers: lets `AutoModelForCausalLM.from_pretrained` load a run's `model/` folder."""

import inspect
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

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to keep a part elsewhere than where it computes: accelerate fetches such parts module by module.

        It would leave out clip values: they belong to a ParameterList, a module that never runs.

        Raises:
            ValueError: If the device map does.
        """
        places = kwargs.get("device_map")
        places = {str(place) for place in places.values()} if isinstance(places, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError("device_map: a bisup model lies on GPUs, or on the CPU as a whole; give it more of them")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not hasattr(model, "model"):
            raise ValueError("a bisup model loads as AutoModelForCausalLM, not as its decoder alone")
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
    tokens. Otherwise all stand behind the exact prompt, and where there is an attention mask, or the text comes in
    chunks, a row's own copy is masked out as soon as it is complete.

    Args:
        model: The loaded model.
        kv: Quantizer of keys and values.
    """

    def __init__(self, model: PreTrainedModel, kv: KVQuantizer) -> None:
        self.num_layers, self.kv = model.config.num_hidden_layers, kv
        self.prompt: PromptKV | None = getattr(model, "prompt_kv", None)
        self.parameters = tuple(inspect.signature(decoder(model).forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments with which the decoder runs."""
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        cache, ids_BT, mask_BT = kwargs.get(CACHE), kwargs.get("input_ids"), kwargs.get("attention_mask")
        if mask_BT is not None and (not isinstance(mask_BT, Tensor) or mask_BT.ndim != 2):
            raise ValueError(
                "a bisup model takes attention masks of shape [batch, tokens] only, and no cache_implementation"
            )
        if not isinstance(cache, PromptCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("a bisup model needs its own cache: pass none, or the one that it returned")
            cache = PromptCache(self.num_layers, self.kv, self.prompt)
        if not cache.layers[0].is_initialized:
            # Without a mask, texts of which only some hold the prompt are taken as they are: so perplexity is measured.
            whole = mask_BT is None and ids_BT is not None and ids_BT.shape[1] >= cache.length
            cache.begin(None if whole else ids_BT, self._holds_prompt(ids_BT, mask_BT))
        kwargs[CACHE] = cache
        if cache.tokens_in_front:
            self._find_copies(cache, ids_BT, mask_BT)
            self._stand_behind(kwargs, cache)
        return (), kwargs

    def _holds_prompt(self, ids_BT: Tensor | None, mask_BT: Tensor | None) -> bool:
        """Whether every row begins with the prompt, without padding."""
        if self.prompt is None or ids_BT is None or ids_BT.shape[1] < len(self.prompt.ids):
            return False
        prompt_P = self.prompt.ids.to(ids_BT.device)
        begins = (ids_BT[:, : len(prompt_P)] == prompt_P).all()
        return bool(begins if mask_BT is None else begins & mask_BT[:, 0].bool().all())

    def _find_copies(self, cache: PromptCache, ids_BT: Tensor | None, mask_BT: Tensor | None) -> None:
        """Find rows that begin, behind padding, with a copy of the prompt, until all are long enough to tell."""
        if self.prompt is None or cache.beginning_BT is None or ids_BT is None:
            cache.beginning_BT = None
            return
        held = cache.get_seq_length() - cache.tokens_in_front  # fewer than came, where some were taken back
        beginning_BT = torch.cat([cache.beginning_BT[:, :held], ids_BT], dim=1)
        prompt_P, total = self.prompt.ids.to(ids_BT.device), beginning_BT.shape[1]
        column_T = torch.arange(total, device=ids_BT.device)
        mask_BT = torch.ones_like(beginning_BT) if mask_BT is None else mask_BT[:, :total]
        first_B1 = (mask_BT.cumsum(1) == 0).sum(1, keepdim=True)
        behind_B1 = first_B1 + len(prompt_P)
        columns_BP = (first_B1 + torch.arange(len(prompt_P), device=ids_BT.device)).clamp_max(total - 1)
        holds_B1 = (behind_B1 <= total) & (beginning_BT.gather(1, columns_BP) == prompt_P).all(1, keepdim=True)
        copy_BT = holds_B1 & (column_T >= first_B1) & (column_T < behind_B1)
        cache.own_copy_BT = copy_BT if bool(holds_B1.any()) else None
        cache.beginning_BT = None if bool((behind_B1 <= total).all()) else beginning_BT

    @staticmethod
    def _stand_behind(kwargs: dict[str, Any], cache: PromptCache) -> None:
        """Shift position_ids by P, less the length of a row's own copy of the prompt; extend the mask to the prompt.

        The mask gets P ones in front and masks a row's own copy out.
        """
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
