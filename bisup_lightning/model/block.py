"""A decoder layer whose linears quantize: built from an FP layer, given Θ, fused, or rebuilt from an artifact."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from bisup_lightning.model.family import (
    LINEAR_INPUTS,
    MLP_ACTIVATION,
    Family,
    linear_inputs,
    online_rotation,
    split_gate,
)
from bisup_lightning.model.linear import (
    InputQuantizer,
    PackedLinear,
    PackedSegment,
    QuantLinear,
    QuantNorm,
)
from bisup_lightning.quant import low_rank
from bisup_lightning.quant.integer_product import multiplies
from bisup_lightning.quant.spec import Scheme

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Theta:
    """Which tensors of a block are learned, Θ = {Θ1, Θ2, Θ3} of paper §4.4.

    Args:
        clip: Learn clip values (Θ1, §4.1).
        smoothing: Learn smoothing vectors (Θ2, §4.2): `soft` frees s1 and s2 of each other (SWAS), `hard` ties s2 to
            1/s1 (WAS), `none` leaves them out.
        smoothing_start: Start at s1 = 1/s, s2 = s of the `smoothquant` formula with alpha 0.5, or at `ones`;
            `auto` takes ones on a rotated model, whose channels are alike, and smoothquant elsewhere.
        low_rank: Learn a low-rank compensation (Θ3, §4.3): `slrec` for W(1 + AB), `lrec` for W + AB, or `none`.
        rank: Inner size r of A and B.
    """

    clip: bool = True
    smoothing: Literal["soft", "hard", "none"] = "soft"
    smoothing_start: Literal["auto", "smoothquant", "ones"] = "auto"
    low_rank: Literal["slrec", "lrec", "none"] = "slrec"
    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"solver.theta.rank must be at least 1, not {self.rank}")
        if not self.clip and self.smoothing == self.low_rank == "none":
            raise ValueError("solver.theta: nothing is left to learn; choose the solver RTN for that")


def build_layer(family: Family, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The FP decoder layer `index` around the given tensors (shared, not copied), frozen."""
    layer = family.empty_layer(index)
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False)


def quantize_layer(
    layer: nn.Module,
    scheme: Scheme,
    config: PretrainedConfig,
    activation_clip: float,
    storage_dtype: torch.dtype,
    orders: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace a layer's linears and the norms that feed them, in place: rounding with grid-searched weight clips.

    Args:
        layer: An FP decoder layer; its weights are shared where the scheme leaves them in place.
        scheme: The quantizers.
        config: The model's configuration.
        activation_clip: Start of the activations' clip values.
        storage_dtype: The checkpoint's own dtype, in which scales, clip values and norms are stored.
        orders: Order of the channels [I] of each linear input by its name, outliers last; needed if the scheme has any.

    Raises:
        ValueError: If a group size does not divide a linear's inputs.
    """
    orders = orders or {}
    for entry in LINEAR_INPUTS:
        order_I = orders.get(entry.name)
        if order_I is None or not entry.producers:
            continue
        for name in entry.producers:  # absorbed: the channels come out in the new order
            producer = _part(layer, name, nn.Linear)
            producer.weight = nn.Parameter(producer.weight[order_I], requires_grad=False)
            if producer.bias is not None:
                producer.bias = nn.Parameter(producer.bias[order_I], requires_grad=False)
        reader = _part(layer, entry.linears[0], nn.Linear)
        reader.weight = nn.Parameter(reader.weight[:, order_I], requires_grad=False)

    def make_linear(linear: nn.Linear, arranged: InputQuantizer, input_quantizer: nn.Module) -> QuantLinear:
        weight = linear.weight
        if arranged.rotated:  # in float64, cast once
            weight = arranged.arrange(weight.double()).to(weight.dtype)
        elif arranged.order is not None:
            weight = arranged.arrange(weight)
        segments = scheme.segments(weight.shape[1], scheme.weights)
        return QuantLinear(weight, linear.bias, segments, input_quantizer, storage_dtype)

    _replace(layer, scheme, config, make_linear, activation_clip, storage_dtype, orders)
    return layer


def pack_layer(layer: nn.Module, scheme: Scheme, config: PretrainedConfig) -> nn.Module:
    """Give a layer the form that it has fused, in place, with meta tensors to be filled from an artifact."""

    def make_linear(linear: nn.Linear, arranged: InputQuantizer, input_quantizer: nn.Module) -> PackedLinear:
        rows, features = linear.weight.shape
        segments = [PackedSegment(rows, segment) for segment in scheme.segments(features, scheme.weights)]
        return PackedLinear(segments, None if linear.bias is None else torch.empty(rows), input_quantizer)

    with torch.device("meta"):
        _replace(layer, scheme, config, make_linear)
    return layer.requires_grad_(False)


def _part(layer: nn.Module, name: str, kind: type[ModuleT]) -> ModuleT:
    part = layer.get_submodule(name)
    assert isinstance(part, kind), f"{name} is a {type(part).__name__}, not a {kind.__name__}"
    return part


def _replace(
    layer: nn.Module,
    scheme: Scheme,
    config: PretrainedConfig,
    make_linear: Callable[[nn.Linear, InputQuantizer, nn.Module], nn.Module],
    activation_clip: float = 1.0,
    storage_dtype: torch.dtype | None = None,
    orders: Mapping[str, Tensor] | None = None,
) -> None:
    for entry in LINEAR_INPUTS:
        linears = [_part(layer, name, nn.Linear) for name in entry.linears]
        weight = linears[0].weight
        quantizer = InputQuantizer(
            scheme.segments(weight.shape[1], scheme.activations),
            activation_clip,
            storage_dtype,
            rotated=online_rotation(entry, config) if scheme.hadamard else 0,
            reordered=scheme.outliers > 0 and not entry.producers,
        ).to(weight.device, non_blocking=True)
        if quantizer.order is not None and orders is not None:
            quantizer.order = orders[entry.name].to(quantizer.order)
        own: nn.Module = quantizer
        if entry.norm is not None:
            layer.set_submodule(entry.norm, QuantNorm(layer.get_submodule(entry.norm), quantizer, storage_dtype))
            own = nn.Identity()
        for name, linear in zip(entry.linears, linears, strict=True):
            layer.set_submodule(name, make_linear(linear, quantizer, own))


def draw_low_rank(
    shapes: Iterable[Sequence[int]], theta: Theta, generator: torch.Generator, pinned: bool
) -> list[tuple[Tensor, Tensor]]:
    """A [O, r] and B [r, I] of a layer's linears at their start, on the host.

    Args:
        shapes: Of the weights [O, I], in the order of LINEAR_INPUTS.
        theta: What to learn; the list is empty if no such matrices are.
        generator: Draws A.
        pinned: Whether they go to a GPU, which copies from pinned memory while it computes.
    """
    if theta.low_rank == "none":
        return []
    drawn = [low_rank.start(rows, features, theta.rank, generator) for rows, features in shapes]
    return [(a_OR.pin_memory(), b_RI.pin_memory()) for a_OR, b_RI in drawn] if pinned else drawn


def add_theta(
    layer: nn.Module,
    theta: Theta,
    generator: torch.Generator,
    absmax: Mapping[str, Tensor] | None = None,
    drawn: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Give a quantized layer its learnable tensors, in place; at a start of ones its output stays what it was.

    Args:
        layer: A layer from `quantize_layer`.
        theta: What to learn.
        generator: Draws A.
        absmax: Largest magnitude of each channel of each linear input [I], by its name; `smoothquant` needs it.
        drawn: What `draw_low_rank` gives, if that is known already.

    Raises:
        KeyError: If `smoothquant` lacks the figures of an input.
    """
    absmax = absmax or {}
    rotated = any(isinstance(module, InputQuantizer) and module.rotated for module in layer.modules())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(theta.clip and is_clip(name))
    weights = [_part(layer, name, QuantLinear).weight for entry in LINEAR_INPUTS for name in entry.linears]
    if drawn is None:
        drawn = draw_low_rank((weight.shape for weight in weights), theta, generator, weights[0].is_cuda)
    matrices = iter(drawn)
    for entry in LINEAR_INPUTS:
        linears = [_part(layer, name, QuantLinear) for name in entry.linears]
        if entry.norm is not None and theta.smoothing != "none":
            norm = _part(layer, entry.norm, QuantNorm)
            order = norm.quantizer.order
            s_I = torch.ones_like(linears[0].weight[0], dtype=torch.float32)
            if theta.smoothing_start == "smoothquant" or (theta.smoothing_start == "auto" and not rotated):
                s_I = _smoothquant(absmax[entry.name], linears, order)
            norm.smoothing = nn.Parameter(1 / s_I)
            for linear in linears:
                if theta.smoothing == "hard":
                    linear.tie_smoothing(norm.smoothing, order)
                else:
                    linear.add_smoothing(nn.Parameter((s_I if order is None else s_I[order]).clone()))
        if theta.low_rank != "none":
            for linear in linears:
                a_OR, b_RI = (matrix.to(linear.weight.device, non_blocking=True) for matrix in next(matrices))
                linear.add_low_rank(theta.low_rank, a_OR, b_RI)


def _smoothquant(absmax_I: Tensor, linears: list[QuantLinear], order_I: Tensor | None, alpha: float = 0.5) -> Tensor:
    """max|X|^α / max|W|^(1−α) for each channel (SmoothQuant, eq. 4), scaled to a geometric mean of one."""
    weight_absmax_I = torch.stack([linear.weight.abs().amax(0).float() for linear in linears]).amax(0)
    if order_I is not None:
        weight_absmax_I = torch.empty_like(weight_absmax_I).scatter_(0, order_I.long(), weight_absmax_I)
    s_I = absmax_I.float().clamp_min(1e-5) ** alpha / weight_absmax_I.clamp_min(1e-5) ** (1 - alpha)
    return s_I / s_I.log().mean().exp()


def is_clip(name: str) -> bool:
    """Whether a parameter of this name is a clip value."""
    return ".clips." in name


def is_quantizers(name: str) -> bool:
    """Whether a tensor of a fused layer of this name is part of a quantizer: codes, scales, clip values, orders."""
    return is_clip(name) or ".segments." in name or name.endswith(".order")


def theta_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable tensors of a layer by name, each once."""
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def theta_by_kind(layer: nn.Module) -> dict[str, list[Tensor]]:
    """The values of a layer's Θ: `weight_clip`, `activation_clip`, `s1`, `s2` and `low_rank`, the products AB [O, I].

    Kinds that nothing in the layer has are left out; so are clip values of what is not quantized.
    """
    kinds: dict[str, list[Tensor]] = {}
    for module in layer.modules():
        if isinstance(module, QuantNorm) and module.smoothing is not None:
            kinds.setdefault("s1", []).append(module.smoothing)
        if isinstance(module, InputQuantizer | QuantLinear):
            kind = "weight_clip" if isinstance(module, QuantLinear) else "activation_clip"
            pairs = zip(module.segments, module.clips, strict=True)
            kinds.setdefault(kind, []).extend(clip for segment, clip in pairs if segment.spec is not None)
        if isinstance(module, QuantLinear) and module.smoothing is not None:
            s_I = module.smoothing
            kinds.setdefault("s2", []).append(1 / s_I if module.smoothing_is_inverse else s_I)
        if isinstance(module, QuantLinear) and module.low_rank_a is not None and module.low_rank_b is not None:
            kinds.setdefault("low_rank", []).append(module.low_rank_a @ module.low_rank_b)
    return {kind: tensors for kind, tensors in kinds.items() if tensors}


def learn_by_codes(layer: nn.Module, on: bool = True) -> None:
    """Let a layer's training passes multiply integer codes wherever its quantizers and its device allow, or no more."""
    for entry in LINEAR_INPUTS:
        place = f"{entry.linears[0]}.input_quantizer" if entry.norm is None else f"{entry.norm}.quantizer"
        quantizer = _part(layer, place, InputQuantizer)
        linears = [_part(layer, name, QuantLinear) for name in entry.linears] if on else []
        quantizer.with_codes = on and all(multiplies(quantizer.segments, x.segments, x.weight) for x in linears)
        if entry is MLP_ACTIVATION:
            split_gate(layer, on=quantizer.with_codes and not quantizer.rotated)


@torch.no_grad()
def fuse_layer(layer: nn.Module) -> nn.Module:
    """Fold Θ into norms and integer weights, in place.

    Learning already saw every number as it will be stored, so the layer's output stays the same.

    Args:
        layer: A layer from `quantize_layer`, with or without Θ.
    """
    learn_by_codes(layer, on=False)
    for entry, linears in linear_inputs(layer):
        for name, linear in zip(entry.linears, linears, strict=True):
            if isinstance(linear, QuantLinear):
                layer.set_submodule(name, linear.fuse())
        if entry.norm is not None:
            _part(layer, entry.norm, QuantNorm).fuse()
    return layer.requires_grad_(False)


@torch.no_grad()
def hold_dense(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a fused layer dequantize its weights once instead of in every forward pass, in place; for several passes."""
    for module in layer.modules():
        if isinstance(module, PackedLinear):
            module.hold_dense(dtype)
    return layer


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


def check_scheme(family: Family, scheme: Scheme) -> None:
    """Refuse a group size or a number of outliers that does not fit the inputs of some linear, before any work.

    Raises:
        ValueError: Naming the quantizer and the linear.
    """
    shapes = family.layer_shapes(0)
    for place, spec in {"weights": scheme.weights, "activations": scheme.activations}.items():
        for name in (name for entry in LINEAR_INPUTS for name in entry.linears):
            try:
                scheme.segments(shapes[f"{name}.weight"][1], spec)
            except ValueError as error:
                raise ValueError(f"precision.{place}: {error} of {name}") from error
