"""GPTQ: round a weight column by column while later columns make up for it (Frantar et al. 2022, arXiv 2210.17323).

It lowers trace((W − Ŵ) H (W − Ŵ)ᵀ), where H = Σ xᵀx over the inputs of a linear layer. Rounding column i moves every
later column j by −(w_i − ŵ_i)·[H⁻¹]_ij/[H⁻¹]_ii, the inverse taken over the columns not yet rounded. A multiple of H
gives the same result: neither the paper's factor 2 nor a division by the number of tokens is needed.

Shape suffixes: O output rows, I input features, G groups of g elements each, T tokens, C the columns of a segment, B
those of a block. The walk holds the weight as w_IO, so that a column of W is consecutive in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bisup_lightning.quant.affine import dequantize, scale_and_offset, to_groups, wide
from bisup_lightning.quant.clipping import search_weight_clip
from bisup_lightning.quant.spec import QuantSpec

MAX_DAMP = 1.0  # here H is half identity: whatever still fails is no Hessian


class ClippedSegment(NamedTuple):
    """Neighbouring columns under one quantizer: all of a weight, or for Atom the normal and the outlier channels.

    Args:
        columns: How many columns.
        spec: Their symmetric quantizer; null keeps them at the weight's own dtype, moved by what the others lost.
        clip_OG: Clip values, broadcastable to [O, G]; null searches them on the weight as it is when its scale is set.
    """

    columns: int
    spec: QuantSpec | None
    clip_OG: Tensor | None = None


class QuantizedSegment(NamedTuple):
    """Codes [O, C] (int16) and scale [O, G] of a segment; where its spec is null, its values [O, C] and no scale."""

    codes: Tensor
    scale_OG: Tensor | None

    def dequantize(self) -> Tensor:
        """Values [O, C]: in the wide dtype of the scale, or in the weight's dtype where nothing was quantized."""
        return self.codes if self.scale_OG is None else dequantize(self.codes, self.scale_OG)


@torch.no_grad()
def accumulate_hessian(hessian_II: Tensor, x_TI: Tensor) -> Tensor:
    """Add xᵀx to a Hessian in place; sums of several batches or ranks may simply be added.

    Args:
        hessian_II: Running sum [I, I], float32 or float64; zeros at the start.
        x_TI: Inputs [..., I] as the linear layer sees them, that is, quantized and dequantized. Any float dtype.

    Returns:
        The same `hessian_II`.

    Raises:
        ValueError: If the Hessian is 16 bits wide.
    """
    if hessian_II.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a Hessian is summed in float32 or float64, not {hessian_II.dtype}")
    x_TI = x_TI.reshape(-1, x_TI.shape[-1]).to(hessian_II.dtype)
    return hessian_II.addmm_(x_TI.T, x_TI)


@torch.no_grad()
def gptq_quantize(
    w_OI: Tensor,
    hessian_II: Tensor,
    segments: Sequence[ClippedSegment],
    *,
    blocksize: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> list[QuantizedSegment]:
    """Codes and scales of a weight by GPTQ, with the meaning that `affine.quantize` gives them.

    A scale is set when the walk reaches its group, from the weight as earlier columns have changed it by then; where
    the first segment is one group, that is the original weight. With `act_order` all scales of a segment are set when
    the walk reaches the segment (static groups), which lets codes stay in the original column order.

    A column whose input was always zero is rounded as it is: its error costs nothing on the calibration inputs, H
    couples it to no other column, and unlike a zero it still serves inputs that calibration has not seen.

    Args:
        w_OI: Weight [O, I], any float dtype; the walk runs in float32, or float64 where it already is.
        hessian_II: Sum of xᵀx [I, I] or any multiple of it; factorized in its own dtype.
        segments: From left to right, they cover the columns. The last one absorbs what all others lost.
        blocksize: Columns between two updates of the whole rest. It changes the speed and not the result.
        damp: Part of the diagonal's mean that is added to the diagonal; raised tenfold, up to 1, while H is singular.
        act_order: Round the columns of the largest inputs first. Segments keep their order, so that outliers stay last.
        scale_dtype: Storage dtype that scales are rounded to.

    Returns:
        One `QuantizedSegment` for each segment, columns in their original order.

    Raises:
        ValueError: If a spec is asymmetric, a number is out of range, shapes do not agree, or H is not finite or not
            positive semi-definite.
    """
    _check(w_OI, hessian_II, segments, blocksize, damp)
    orders = _walking_orders(hessian_II.diagonal(), segments, act_order)
    order_I = torch.cat(orders)  # from here on, "later" means to the right
    share_II = _error_shares(wide(hessian_II)[order_I[:, None], order_I], damp).to(wide(w_OI).dtype)
    w_IO = wide(w_OI).T[order_I].contiguous()

    quantized, start = [], 0
    for segment, order_C in zip(segments, orders, strict=True):
        rest_IO, order_C = w_IO[start:], order_C - start
        place_C = order_C.argsort()  # where the walk has put each column of the segment
        scale_GO = None
        if segment.spec is not None:
            extent = segment.columns if act_order else segment.spec.group_size or segment.columns
            scale_GO = _walk(rest_IO, share_II[start:, start:], segment, order_C, extent, blocksize, scale_dtype)
        dtype = w_OI.dtype if scale_GO is None else torch.int16
        codes = rest_IO[place_C].to(dtype).T.contiguous()
        quantized.append(QuantizedSegment(codes, None if scale_GO is None else scale_GO.T.contiguous()))
        start += segment.columns
    return quantized


def _check(w_OI: Tensor, hessian_II: Tensor, segments: Sequence[ClippedSegment], blocksize: int, damp: float) -> None:
    """Refuse what the walk cannot do before it starts."""
    rows, features = w_OI.shape
    if hessian_II.shape != (features, features):
        raise ValueError(f"a weight of {features} columns needs as many in its Hessian, not {list(hessian_II.shape)}")
    if sum(segment.columns for segment in segments) != features or min(segment.columns for segment in segments) < 1:
        raise ValueError(f"segments of {[s.columns for s in segments]} columns do not cover {features}")
    if blocksize < 1 or damp < 0:
        raise ValueError(f"blocksize {blocksize} must be positive and damp {damp} not negative")
    for columns, spec, clip_OG in segments:
        if spec is None:
            continue
        if not spec.symmetric:
            raise ValueError("GPTQ quantizes symmetrically: spec.symmetric must be true")
        shape = rows, spec.groups(columns)
        if clip_OG is not None and clip_OG.shape not in {shape, (1, shape[1]), (rows, 1), (1, 1)}:
            raise ValueError(f"clip values {list(clip_OG.shape)} do not broadcast to {list(shape)}")


def _walking_orders(diagonal_I: Tensor, segments: Sequence[ClippedSegment], act_order: bool) -> list[Tensor]:
    """The columns of each segment in the order they are rounded, as indices into the whole weight."""
    columns = torch.arange(len(diagonal_I), device=diagonal_I.device).split([segment.columns for segment in segments])
    if not act_order:
        return list(columns)
    return [order_C[diagonal_I[order_C].argsort(descending=True, stable=True)] for order_C in columns]


def _error_shares(hessian_II: Tensor, damp: float) -> Tensor:
    """How much of column i's error each later column takes: unit upper triangular, [H⁻¹]_ij/[H⁻¹]_ii over columns ≥ i.

    The paper's Cholesky factor U of H⁻¹ = UᵀU, each row divided by its diagonal. As H = U⁻¹U⁻ᵀ, the factor of H taken
    from its last column backwards is U⁻¹: one factorization and a triangular inverse, and H⁻¹ is never formed.

    Args:
        hessian_II: Hessian [I, I] in walking order; its diagonal is overwritten.
        damp: Where damping starts.

    Raises:
        ValueError: If it stays singular at `MAX_DAMP`.
    """
    diagonal_I = hessian_II.diagonal().clone()
    mean = diagonal_I.mean()
    diagonal_I[diagonal_I == 0] = 1  # any number: nothing is coupled to a dead column
    noise = torch.finfo(diagonal_I.dtype).eps * len(diagonal_I) ** 0.5  # of a pivot, in parts of its diagonal element
    while True:
        damped_I = diagonal_I + damp * mean
        hessian_II.diagonal().copy_(damped_I)
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        pivot_I = lower_II.diagonal()
        if not failed and bool((pivot_I.square() > noise * damped_I.flip(0)).all()):  # false for NaN too
            break
        if damp >= MAX_DAMP:
            raise ValueError("the Hessian is not finite or not positive semi-definite")
        damp = min(10 * damp or 1e-4, MAX_DAMP)
    identity_II = torch.eye(len(pivot_I), dtype=lower_II.dtype, device=lower_II.device)
    inverse_II = torch.linalg.solve_triangular(lower_II / pivot_I, identity_II, upper=False, unitriangular=True)
    return inverse_II.flip(0, 1)


def _walk(
    w_IO: Tensor,
    share_II: Tensor,
    segment: ClippedSegment,
    order_C: Tensor,
    extent: int,
    blocksize: int,
    scale_dtype: torch.dtype | None,
) -> Tensor:
    """Turn the first C columns of w_IO into codes and move the rest against their errors, both in place.

    Args:
        w_IO: The segment's columns in walking order, and all that follow.
        share_II: Error shares of the same columns.
        segment: The segment, whose spec is not null.
        order_C: Its columns in walking order, counted within the segment.
        extent: Columns whose scales are set together; their walking order stays among themselves.
        blocksize: Most columns of a block; a block ends with its extent, so that the next scales see the whole update.
        scale_dtype: Storage dtype of the scales.

    Returns:
        Scale [G, O].
    """
    columns, spec, clip_OG = segment
    assert spec is not None
    size, place_C = spec.group_size or columns, order_C.argsort()
    if clip_OG is None and spec.granularity == "tensor":  # one clip for groups that are reached one by one
        clip_OG = search_weight_clip(w_IO[place_C].T, spec, scale_dtype)
    scale_GO = w_IO.new_empty(columns // size, w_IO.shape[1])
    for start in range(0, columns, extent):
        stop = start + extent
        groups = slice(start // size, stop // size)
        now_OI = w_IO[place_C[start:stop]].T
        if clip_OG is None:
            clip_now = search_weight_clip(now_OI, spec, scale_dtype)
        else:
            clip_now = clip_OG.expand(-1, len(scale_GO))[:, groups]
        scale, _ = scale_and_offset(to_groups(now_OI, spec), spec, clip_now, scale_dtype)
        scale_GO[groups] = scale.squeeze(-1).T
        for first in range(start, stop, blocksize):
            group_B = order_C[first : min(first + blocksize, stop)] // size
            _walk_block(w_IO[first:], share_II[first:, first:], scale_GO[group_B], spec)
    return scale_GO


def _walk_block(w_IO: Tensor, share_II: Tensor, scale_BO: Tensor, spec: QuantSpec) -> None:
    """Turn the first B columns into codes one by one, in place; what follows them is updated once, by one product."""
    size, error_BO = len(scale_BO), torch.empty_like(scale_BO)
    for i in range(size):
        code_O = (w_IO[i] / scale_BO[i]).round_().clamp_(spec.qmin, spec.qmax)
        torch.addcmul(w_IO[i], code_O, scale_BO[i], value=-1, out=error_BO[i])
        w_IO[i + 1 : size].addr_(share_II[i, i + 1 : size], error_BO[i], alpha=-1)
        w_IO[i] = code_O
    w_IO[size:].addmm_(share_II[:size, size:].T, error_BO, alpha=-1)
