"""A decoder layer whose linears quantize: built from an FP layer, given Θ, fused, or rebuilt from an artifact."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bisup_lightning.model.family import DECODER_INPUTS, Family, linear_inputs
from bisup_lightning.model.linear import InputQuantizer, LowRankForm, PackedLinear, QuantLinear, QuantNorm
from bisup_lightning.quant import low_rank
from bisup_lightning.quant.clipping import search_weight_clip
from bisup_lightning.quant.spec import Precision, QuantSpec


@dataclass(frozen=True)
class Theta:
    """Which tensors of a block are learned, Θ = {Θ1, Θ2, Θ3} of paper §4.4.

    Args:
        clip: Learn clip values (Θ1, §4.1).
        smoothing: Learn smoothing vectors (Θ2, §4.2): `soft` frees s1 and s2 of each other (SWAS), `hard` ties s2 to
            1/s1 (WAS), null leaves them out.
        smoothing_start: Start at s1 = 1/s, s2 = s of the `smoothquant` formula with alpha 0.5, or at `ones` (paper).
        low_rank: Learn a low-rank compensation (Θ3, §4.3): `slrec` for W(1 + AB), `lrec` for W + AB, null for none.
        rank: Inner size r of A and B.
    """

    clip: bool = True
    smoothing: Literal["soft", "hard"] | None = "soft"
    smoothing_start: Literal["ones", "smoothquant"] = "smoothquant"
    low_rank: LowRankForm | None = "slrec"
    rank: int = 32


def build_layer(family: Family, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The FP decoder layer `index` around the given tensors (shared, not copied), frozen."""
    layer = family.empty_layer(index)
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False)


def quantize_layer(
    layer: nn.Module, precision: Precision, activation_clip: float, storage_dtype: torch.dtype
) -> nn.Module:
    """Replace a layer's linears and the norms that feed them, in place: rounding with grid-searched weight clips.

    Args:
        layer: An FP decoder layer; its weights are shared, not copied.
        precision: The quantizers.
        activation_clip: Start of the activations' clip values.
        storage_dtype: The checkpoint's own dtype, in which scales, clip values and norms are stored.

    Raises:
        ValueError: If a group size does not divide a linear's inputs.
    """

    def make_linear(linear: nn.Module, input_quantizer: nn.Module) -> QuantLinear:
        clip = search_weight_clip(linear.weight, precision.weights, storage_dtype)
        return QuantLinear(linear.weight, linear.bias, precision.weights, clip, input_quantizer, storage_dtype)

    _replace(layer, precision.activations, make_linear, activation_clip, storage_dtype)
    return layer


def pack_layer(layer: nn.Module, precision: Precision) -> nn.Module:
    """Give a layer the form that it has fused, in place, with meta tensors to be filled from an artifact."""

    def make_linear(linear: nn.Module, input_quantizer: nn.Module) -> PackedLinear:
        rows, features = linear.weight.shape
        return PackedLinear(rows, features, precision.weights, linear.bias is not None, input_quantizer)

    with torch.device("meta"):
        _replace(layer, precision.activations, make_linear)
    return layer.requires_grad_(False)


def _replace(
    layer: nn.Module,
    activations: QuantSpec | None,
    make_linear: Callable[[nn.Module, nn.Module], nn.Module],
    activation_clip: float = 1.0,
    storage_dtype: torch.dtype | None = None,
) -> None:
    for entry, linears in linear_inputs(layer):
        weight = linears[0].weight
        quantizer: nn.Module = nn.Identity()
        if activations is not None:
            quantizer = InputQuantizer(weight.shape[1], activations, activation_clip, storage_dtype).to(weight.device)
        if entry.norm is not None:
            layer.set_submodule(entry.norm, QuantNorm(layer.get_submodule(entry.norm), quantizer, storage_dtype))
            quantizer = nn.Identity()
        for name, linear in zip(entry.linears, linears, strict=True):
            layer.set_submodule(name, make_linear(linear, quantizer))


def add_theta(
    layer: nn.Module, theta: Theta, generator: torch.Generator, absmax: Mapping[str, Tensor] | None = None
) -> None:
    """Give a quantized layer its learnable tensors, in place; the layer's output stays what it was (but for
    `smoothquant`, which moves the difficulty from activations to weights at once).

    Args:
        layer: A layer from `quantize_layer`.
        theta: What to learn.
        generator: Draws A.
        absmax: Largest magnitude of each channel of each norm's output [I], by the norm's name; `smoothquant` needs it.
    """
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(theta.clip and name.endswith("clip"))
    for entry, linears in linear_inputs(layer):
        if entry.norm is not None and theta.smoothing is not None:
            norm = layer.get_submodule(entry.norm)
            s_I = torch.ones_like(linears[0].weight[0], dtype=torch.float32)
            if theta.smoothing_start == "smoothquant":
                assert absmax is not None
                s_I = _smoothquant(absmax[entry.norm], linears)
            norm.smoothing = nn.Parameter(1 / s_I)
            for linear in linears:
                hard = theta.smoothing == "hard"
                linear.add_smoothing(norm.smoothing if hard else nn.Parameter(s_I.clone()), is_inverse=hard)
        if theta.low_rank is not None:
            for linear in linears:
                a_OR, b_RI = low_rank.start(*linear.weight.shape, theta.rank, generator)
                linear.add_low_rank(theta.low_rank, a_OR.to(linear.weight.device), b_RI.to(linear.weight.device))


def _smoothquant(absmax_I: Tensor, linears: list[nn.Module], alpha: float = 0.5) -> Tensor:
    """max|X|^α / max|W|^(1−α) for each channel (SmoothQuant, eq. 4), scaled to a geometric mean of one."""
    weight_absmax_I = torch.stack([linear.weight.abs().amax(0).float() for linear in linears]).amax(0)
    s_I = absmax_I.float().clamp_min(1e-5) ** alpha / weight_absmax_I.clamp_min(1e-5) ** (1 - alpha)
    return s_I / s_I.log().mean().exp()


def theta_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable tensors of a layer by name, each once."""
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def fuse_layer(layer: nn.Module) -> nn.Module:
    """Fold Θ into norms and integer weights, in place. Learning already saw every number as it will be stored, so
    the layer's output stays the same.

    Args:
        layer: A layer from `quantize_layer`, with or without Θ.
    """
    for entry, linears in linear_inputs(layer):
        for name, linear in zip(entry.linears, linears, strict=True):
            layer.set_submodule(name, linear.fuse())
        if entry.norm is not None:
            layer.get_submodule(entry.norm).fuse()
    return layer.requires_grad_(False)


@torch.no_grad()
def stored_tensors(layer: nn.Module, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """A fused layer's tensors as the artifact holds them: floats in the checkpoint's own dtype (Alg. A1, line 16)."""
    return {
        name: tensor.to(storage_dtype) if tensor.is_floating_point() else tensor
        for name, tensor in layer.state_dict().items()
    }


def is_fused(layer: nn.Module) -> bool:
    """Whether every linear that quantizes is packed."""
    return all(isinstance(linear, PackedLinear) for _, linears in linear_inputs(layer) for linear in linears)


def check_group_sizes(family: Family, precision: Precision) -> None:
    """Refuse a group size that does not divide the inputs of some linear, before any work.

    Raises:
        ValueError: Naming the quantizer and the linear.
    """
    shapes = family.layer_shapes(0)
    for place, spec in {"weights": precision.weights, "activations": precision.activations}.items():
        for entry in DECODER_INPUTS:
            for name in entry.linears:
                try:
                    if spec is not None:
                        spec.groups(shapes[f"{name}.weight"][1])
                except ValueError as error:
                    raise ValueError(f"precision.{place}: {error} of {name}") from error
