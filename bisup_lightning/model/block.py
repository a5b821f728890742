"""A decoder layer whose linears quantize: built from an FP layer, fused, or rebuilt from an artifact."""

from collections.abc import Callable, Mapping
from typing import TypeVar

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
from bisup_lightning.quant.integer_product import multiplies
from bisup_lightning.quant.spec import Scheme

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
            producer = part(layer, name, nn.Linear)
            producer.weight = nn.Parameter(producer.weight[order_I], requires_grad=False)
            if producer.bias is not None:
                producer.bias = nn.Parameter(producer.bias[order_I], requires_grad=False)
        reader = part(layer, entry.linears[0], nn.Linear)
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


def part(layer: nn.Module, name: str, kind: type[ModuleT]) -> ModuleT:
    """The submodule of that name, which is of that class."""
    found = layer.get_submodule(name)
    assert isinstance(found, kind), f"{name} is a {type(found).__name__}, not a {kind.__name__}"
    return found


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
        linears = [part(layer, name, nn.Linear) for name in entry.linears]
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


def is_clip(name: str) -> bool:
    """Whether a parameter of this name is a clip value."""
    return ".clips." in name


def is_quantizers(name: str) -> bool:
    """Whether a tensor of a fused layer of this name is part of a quantizer: codes, scales, clip values, orders."""
    return is_clip(name) or ".segments." in name or name.endswith(".order")


def learn_by_codes(layer: nn.Module, on: bool = True) -> None:
    """Let a layer's training passes multiply integer codes wherever its quantizers and its device allow, or no more."""
    for entry in LINEAR_INPUTS:
        place = f"{entry.linears[0]}.input_quantizer" if entry.norm is None else f"{entry.norm}.quantizer"
        quantizer = part(layer, place, InputQuantizer)
        linears = [part(layer, name, QuantLinear) for name in entry.linears] if on else []
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
            part(layer, entry.norm, QuantNorm).fuse()
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
