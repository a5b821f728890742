"""What a checkpoint's architecture calls its parts. The only file that names Hugging Face attributes."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bisup_lightning.errors import UserError
from bisup_lightning.quant.gated import Gated


@dataclass(frozen=True)
class LinearInput:
    """An activation that is quantized once: the linears that read it and, if a norm makes it, that norm.

    Args:
        name: What this application calls it.
        linears: Names of the linears that read it.
        norm: Name of the norm that makes it, if one does.
        producers: Linears whose output rows are its channels, one for one, so that a new order can be absorbed in them.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    producers: tuple[str, ...] = ()


ATTENTION_INPUT = LinearInput(
    "attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"
)
ATTENTION_OUTPUT = LinearInput("attention_output", ("self_attn.o_proj",))
MLP_INPUT = LinearInput("mlp_input", ("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm")
MLP_ACTIVATION = LinearInput("mlp_activation", ("mlp.down_proj",), producers=("mlp.gate_proj", "mlp.up_proj"))
RESIDUAL_WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # linears whose output is added to the hidden states
VALUE = "self_attn.v_proj"
LINEAR_INPUTS = (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_ACTIVATION)
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # Qwen1.5 and 2.5 are of type qwen2

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# The keyword by which a decoder and its layers take the cache, and by which a decoder's output gives it back.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.0.dev0") else "past_key_values"
STORED_ROTARY = ".rotary_emb."  # frequencies that old checkpoints hold in every block; config.json implies them


def layer_prefix(index: int) -> str:
    """What the names of block `index`'s tensors begin with in a checkpoint."""
    return f"model.layers.{index}."


def layer_index(name: str) -> int | None:
    """The block that a checkpoint's tensor of this name belongs to, if any."""
    found = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return None if found is None else int(found[1])


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a loaded causal language model."""
    return model.model.layers


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that takes token ids and a cache."""
    return model.model


def attention_half(layer: nn.Module, hidden_BTD: Tensor, **settings: Any) -> Tensor:
    """A layer's first half [B, T, D]: the hidden states plus what attention adds to them."""
    parts: Any = layer
    added_BTD, _ = parts.self_attn(hidden_states=parts.input_layernorm(hidden_BTD), **settings)
    return hidden_BTD + added_BTD


def mlp_half(layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """A layer's second half [B, T, D]."""
    parts: Any = layer
    return hidden_BTD + parts.mlp(parts.post_attention_layernorm(hidden_BTD))


def split_gate(layer: nn.Module, on: bool) -> None:
    """Have an MLP hand the two factors of its gate to its last linear, in place of their product, or no more."""
    mlp: Any = layer.get_submodule("mlp")
    mlp.__dict__.pop("forward", None)
    if on and mlp.config.hidden_act in ("silu", "swish"):
        mlp.forward = MethodType(_mlp_of_factors, mlp)


def _mlp_of_factors(mlp: Any, x_BTD: Tensor) -> Tensor:
    return mlp.down_proj(Gated(mlp.gate_proj(x_BTD), mlp.up_proj(x_BTD)))


def watch_attention(layer: nn.Module, record: Callable[[Tensor], None]) -> None:
    """Have a layer compute its attention weights openly and hand them to `record`, [B, heads, T, P + T] each.

    Such a layer takes additive masks only; without a mask every token sees all others, later ones included.
    """
    attention: Any = layer.self_attn
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "eager"
    attention.register_forward_hook(lambda module, arguments, output: record(output[1]))


def online_rotation(entry: LinearInput, config: PretrainedConfig) -> int:
    """Size of the Hadamard transform that QuaRot applies to an activation at run time; 0 for none.

    It mixes the heads of attention's output, and all channels of the MLP's activation.
    """
    if entry is ATTENTION_OUTPUT:
        return config.num_attention_heads
    return config.intermediate_size if entry is MLP_ACTIVATION else 0


def head_dim(config: PretrainedConfig) -> int:
    """Size of one attention head, which need not be hidden size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Family:
    """Builds the blocks of one architecture, empty, and the shared parts around them.

    Args:
        config: The checkpoint's configuration.
        attention: The name of transformers' attention function that the blocks use.

    Raises:
        UserError: If the architecture is not supported.
    """

    def __init__(self, config: PretrainedConfig, attention: str = "sdpa") -> None:
        if config.model_type not in SUPPORTED:
            raise UserError(
                f"checkpoint: architecture '{config.model_type}' is not supported; supported: {', '.join(SUPPORTED)}"
            )
        self.config = config
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.vocab_size: int = config.vocab_size
        if config.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"{config.num_attention_heads} attention heads can't share {self.num_kv_heads} KV heads")
        rotated = 2 * self._skeleton.model.rotary_emb.inv_freq.numel()
        if rotated != self.head_dim:
            raise ValueError(f"{rotated} channels of a head are rotated, not {self.head_dim}")

    @classmethod
    def of_folder(cls, folder: str, num_layers: int, attention: str = "sdpa") -> "Family":
        """Read the configuration in a checkpoint's folder.

        Args:
            folder: The folder.
            num_layers: How many blocks the checkpoint holds: nothing is built for others that a configuration names.
            attention: See the class.

        Raises:
            UserError: If it can't be read, contradicts itself or the checkpoint, or names an unsupported architecture.
        """
        try:
            text = Path(folder, "config.json").read_text(encoding="utf-8")
            named = json.loads(text, parse_constant=_refuse_constant).get("num_hidden_layers", num_layers)
            if named == num_layers:
                family = cls(AutoConfig.from_pretrained(folder, trust_remote_code=False), attention)
                named = family.num_layers
            if named != num_layers:
                raise ValueError(f"num_hidden_layers is {named}, but the weights are those of {num_layers} blocks")
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes the library stumble over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"checkpoint: {folder}/config.json: {reason[:300]}") from error
        return family

    def empty_layer(self, index: int) -> nn.Module:
        """Block `index` on the meta device, to be filled with `load_state_dict(..., assign=True)`.

        Every block has layer index 0: the caches of one block ignore it, and one compiled graph then serves all blocks.
        """
        layer = copy.deepcopy(decoder_layers(self._skeleton)[index])
        layer.get_submodule("self_attn").layer_idx = 0  # type: ignore[assignment]  # a number, not a module
        return layer

    def final_norm(self, weight_D: Tensor) -> nn.Module:
        """The norm before the head."""
        norm = copy.deepcopy(self._skeleton.model.norm)
        norm.load_state_dict({"weight": weight_D}, assign=True)
        return norm

    def rotary(self) -> nn.Module:
        """The rotary embedding: (hidden, position_ids) to (cos, sin), on the CPU in float32."""
        return type(self._skeleton.model.rotary_emb)(config=self.config)

    @property
    def tied(self) -> bool:
        """Whether the configuration says that the output projection is the embedding."""
        return self.config.tie_word_embeddings

    @property
    def quantizer(self) -> str | None:
        """The method by which the configuration says that the weights are quantized, if it does."""
        quantization = getattr(self.config, "quantization_config", None) or {}
        return quantization.get("quant_method", "an unnamed one") if quantization else None

    def check_length(self, key: str, length: int) -> None:
        """Refuse texts of more tokens than the model has positions; those of a prompt in front do not count.

        Args:
            key: The configuration key.
            length: What it holds.

        Raises:
            UserError: With the number of positions.
        """
        stretched = (getattr(self.config, "rope_parameters", None) or {}).get("factor", 1)
        most = int(self.config.max_position_embeddings * max(1, stretched))
        if length > most:
            raise UserError(f"{key}: {length} tokens are more than the model's {most} positions; give {most} or fewer")

    def sliding_window(self, index: int) -> int | None:
        """How many positions block `index` sees, itself included; None for all."""
        if self.config.model_type == "llama":  # its attention knows no window, whatever the configuration carries along
            return None
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return window if types[index] == "sliding_attention" else None
        return window

    def shapes(self) -> dict[str, torch.Size]:
        """Name and shape of every tensor that a checkpoint must hold; a head is needed only where it is not tied."""
        vocabulary = torch.Size([self.vocab_size, self.hidden_size])
        shapes = {EMBEDDING: vocabulary, FINAL_NORM: torch.Size([self.hidden_size])}
        for index in range(self.num_layers):
            shapes |= {layer_prefix(index) + name: shape for name, shape in self.layer_shapes(index).items()}
        return shapes

    def layer_shapes(self, index: int) -> dict[str, torch.Size]:
        """Name and shape of every tensor of block `index`."""
        return {name: tensor.shape for name, tensor in decoder_layers(self._skeleton)[index].state_dict().items()}


def linear_inputs(layer: nn.Module) -> Iterator[tuple[LinearInput, list[nn.Module]]]:
    """Each quantized activation of a block with the linears that read it."""
    for entry in LINEAR_INPUTS:
        yield entry, [layer.get_submodule(name) for name in entry.linears]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
