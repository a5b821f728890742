"""Affine quantization of the last dimension, with straight-through gradients.

Shape suffixes: O output rows, I input features, G groups of g elements each (I = G·g); `...` any leading dimensions.
All arithmetic runs in float32 or wider, whatever the dtype of the tensors, and results come back in the input's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bisup_lightning.quant import operators
from bisup_lightning.quant.spec import MIN_SCALE, QuantSpec, Segment


def to_groups(x: Tensor, spec: QuantSpec) -> Tensor:
    """View [..., I] as [..., G, g].

    Raises:
        ValueError: If the group size does not divide I.
    """
    return x.unflatten(-1, (spec.groups(x.shape[-1]), -1))


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that quantization computes in: float32, or float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def scale_and_offset(
    x_Gg: Tensor, spec: QuantSpec, clip_G: Tensor | None = None, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale Δ (eq. 1 and 3) and, when asymmetric, the offset that code 0 stands for. Differentiable.

    Args:
        x_Gg: Grouped values [..., G, g].
        spec: The quantizer.
        clip_G: Clip values c, broadcastable to [..., G]; None means 1.
        scale_dtype: Storage dtype that the scale is rounded to (straight-through): what is trained is what is saved.

    Returns:
        Scale [..., G, 1] and offset [..., G, 1] (None when symmetric), in the wide dtype.
    """
    x_Gg = wide(x_Gg)
    if spec.symmetric:
        reach, offset = _Maximum.apply(x_Gg.abs()), None
    else:
        offset = -_Maximum.apply(-x_Gg)
        reach = _Maximum.apply(x_Gg) - offset
    scale = reach / spec.qmax
    if clip_G is not None:
        scale = scale * clip_G.to(scale.dtype).unsqueeze(-1)
    return storable(scale, scale_dtype), offset


class _Maximum(torch.autograd.Function):
    """Maximum of the last dimension, which is kept as [..., 1]; the gradient goes to the first element that equals it.

    Its index is saved, not x to compare with: compiled code computes x anew in the backward pass, where the last digit
    may differ and nothing equal the maximum.
    """

    @staticmethod
    def forward(ctx, x):
        maximum, index = x.max(-1, keepdim=True)
        ctx.save_for_backward(index)
        ctx.size = x.shape[-1]
        return maximum

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad * (torch.arange(ctx.size, device=grad.device) == index)


def as_stored(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """X rounded to the dtype that it will be stored in, kept in its own; the gradient passes straight through."""
    return x if dtype in (None, x.dtype) else _there_and_back(x, dtype)


@torch.library.custom_op("bisup::there_and_back", mutates_args=())
def _there_and_back(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X cast to a dtype and back. An operator, because torch.compile would drop two casts that undo each other."""
    return x.to(dtype).to(x.dtype)


_there_and_back.register_fake(lambda x, dtype: torch.empty_like(x))
_there_and_back.register_autograd(lambda ctx, grad: (grad, None))


def storable(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A scale as it will be stored, and neither zero nor beyond what its dtype holds."""
    scale_max = None if dtype is None else torch.finfo(dtype).max
    return as_stored(scale.clamp(MIN_SCALE, scale_max), dtype).clamp_min(MIN_SCALE)


def quantize(
    x: Tensor, spec: QuantSpec, clip_G: Tensor | None = None, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integer codes of [..., I] (eq. 2).

    Returns:
        Codes [..., I] (int16, which holds every width), scale [..., G] and offset [..., G] (None when symmetric).
    """
    x_Gg = to_groups(x, spec)
    scale, offset = scale_and_offset(x_Gg, spec, clip_G, scale_dtype)
    shifted = wide(x_Gg) if offset is None else wide(x_Gg) - offset
    codes = (shifted / scale).round().clamp(spec.qmin, spec.qmax)
    return (
        codes.flatten(-2).to(torch.int16),
        scale.squeeze(-1),
        None if offset is None else offset.squeeze(-1),
    )


def dequantize(codes: Tensor, scale_G: Tensor, offset_G: Tensor | None = None) -> Tensor:
    """Values [..., I] in the wide dtype of the scale, from codes [..., I] and scale (and offset) [..., G]."""
    scale = wide(scale_G).unsqueeze(-1)
    x = codes.unflatten(-1, (scale_G.shape[-1], -1)).to(scale.dtype) * scale
    if offset_G is not None:
        x = x + wide(offset_G).unsqueeze(-1)
    return x.flatten(-2)


class _RoundToGrid(torch.autograd.Function):
    """Nearest grid point clamp(round(x/Δ))·Δ; gradients of x and Δ pass straight through the rounding.

    With t = x/Δ, q = clamp(round(t)) and m = [q unclamped]: ∂/∂x = m, ∂/∂Δ = q − m·t. Written out because autograd's
    own composition keeps six tensors of x's size where this keeps one. Holds no cast: compiled by torch 2.11, one that
    changes nothing would cut the gradient off.
    """

    @staticmethod
    def forward(ctx, x, scale, qmin, qmax):
        ctx.save_for_backward(x, scale)
        ctx.range = qmin, qmax
        return (x / scale).round().clamp_(qmin, qmax) * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        t = x / scale
        rounded = t.round()
        q = rounded.clamp(*ctx.range)
        inside = rounded == q
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = (grad * (q - t * inside)).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scale, None, None


def fake_quantize(
    x: Tensor, spec: QuantSpec, clip_G: Tensor | None = None, scale_dtype: torch.dtype | None = None
) -> Tensor:
    """Quantize and dequantize [..., I]; gradients reach x (also through the maximum that sets Δ) and the clip values.

    Equal, element by element, to `dequantize(*quantize(...))` cast to x's dtype; but kernels multiply by 1/Δ, so that a
    value halfway between two points of the grid may go to the other one.
    """
    by_kernel = operators.supports(x) and spec.symmetric and scale_dtype is None
    if by_kernel and clip_G is not None and clip_G.ndim == 1:
        return operators.round_rows(x, None, clip_G, spec.bits, x.shape[-1] // spec.groups(x.shape[-1]), False)[0]
    x_Gg = wide(to_groups(x, spec))
    scale, offset = scale_and_offset(x_Gg, spec, clip_G, scale_dtype)
    if offset is None:
        rounded = _RoundToGrid.apply(x_Gg, scale, spec.qmin, spec.qmax)
    else:
        rounded = _RoundToGrid.apply(x_Gg - offset, scale, spec.qmin, spec.qmax) + offset
    return rounded.to(x.dtype).flatten(-2)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Neighbouring columns as one tensor, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def fake_quantize_segments(x: Tensor, segments: Sequence[Segment], clips: Sequence[Tensor]) -> Tensor:
    """`fake_quantize` of [..., I], each segment of columns under its own quantizer and clip values, or as it is."""
    parts = [
        part if segment.spec is None else fake_quantize(part, segment.spec, clip)
        for part, segment, clip in zip(
            x.split([segment.columns for segment in segments], -1), segments, clips, strict=True
        )
    ]
    return side_by_side(parts)
