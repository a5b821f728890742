"""Products of integer codes on float8 tensor cores, instead of those of the values that the codes stand for.

Codes of up to five bits are float8 numbers, and so multiplied and added up exactly; scales come to the sums. A forward
product is done in about half the time. Gradients are not integers: their products are those of the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bisup_lightning.quant import operators
from bisup_lightning.quant.spec import QuantSpec, Segment

MAX_BITS = 5  # float8 (e4m3) holds all integers up to 16
ALIGNED = 16  # rows and columns of float8 matrices come in multiples of this
BLOCK = 128  # the one group size, beside whole rows, that the tensor cores' libraries scale by


@dataclass(frozen=True)
class Coded:
    """A quantized tensor and its codes.

    Args:
        values: [..., I], bfloat16.
        codes: float8 as bytes [..., I].
        scale_GN: Scales [G, N] of the N rows in groups, float32.
    """

    values: Tensor
    codes: Tensor
    scale_GN: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape


def multiplies(inputs: Sequence[Segment], weight: Sequence[Segment], weight_OI: Tensor) -> bool:
    """Whether the device has an exact product for the codes of a weight [O, I] and of its inputs.

    That depends on how both are quantized, on the weight's shape and dtype, and on the GPU.
    """
    specs = [segment.spec for segment in (*inputs, *weight)]
    if len(specs) != 2 or not all(_is_float8(spec) for spec in specs):
        return False
    sizes = {None if spec is None else spec.group_size for spec in specs}
    by_rows, by_blocks = sizes <= {None, weight_OI.shape[1]}, sizes == {BLOCK}
    return (
        operators.supports(weight_OI)
        and weight_OI.dtype == torch.bfloat16
        and not any(size % ALIGNED for size in weight_OI.shape)
        and ((by_rows and _capability(weight_OI) >= (8, 9)) or (by_blocks and _capability(weight_OI) == (9, 0)))
    )


def _is_float8(spec: QuantSpec | None) -> bool:
    return spec is not None and spec.symmetric and spec.bits <= MAX_BITS


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def coded_rows(x: Tensor, segment: Segment, clip_G: Tensor, up: Tensor | None = None) -> Coded | Tensor:
    """`fake_quantize` of an activation [..., I] or, if `up` is given, of silu(x) · up.

    With its codes where tensor cores can multiply them: in bfloat16, the number of rows a multiple of `ALIGNED`.
    """
    assert segment.spec is not None
    coded = x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] % ALIGNED == 0
    size = segment.columns // segment.spec.groups(segment.columns)
    values, codes, scale_GN = operators.round_rows(x, up, clip_G, segment.spec.bits, size, coded)
    return Coded(values, codes, scale_GN) if coded else values


def linear(x: Coded, weight: Coded, bias_O: Tensor | None) -> Tensor:
    """⟨x⟩ Ŵᵀ + bias [..., O] in x's dtype."""
    product = operators.multiply_codes(x.values, weight.values, x.codes, weight.codes, x.scale_GN, weight.scale_GN)
    return product if bias_O is None else product + bias_O
