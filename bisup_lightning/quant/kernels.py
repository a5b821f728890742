"""Triton kernels of the two quantizers that run in every step: the same sums as `affine`, in few passes over memory.

Autograd's composition moves a weight through memory a dozen times in a step, and compiled code still half as often;
these kernels read it, and its gradient, once or twice. Shape suffixes: O output rows, I input features, G groups of g
elements each, R rank, N rows of any kind. A segment is a range of columns, passed as a view: rows may be strided.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bisup_lightning.quant.spec import MIN_SCALE

R = TypeVar("R")

ROW_TILE = 4096  # elements of an activation that a program holds
ROW_PARTS = 8  # into which a weight's rows are split, to add up its gradients side by side
SIZES = ("rows", "columns", "row_stride", "groups", "clip_stride_o", "clip_stride_g")
STORED = {None: None, torch.float32: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nearest(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """clamp(round(t)), halves to even: adding 1.5 · 2^23 leaves no bits behind the point. NaN stays NaN."""
    t = tl.clamp(t, qmin, qmax, propagate_nan=tl.PropagateNan.ALL)
    return (t + 12582912.0) - 12582912.0


@triton.jit
def _scale(absmax, clip, qmax: tl.constexpr, stored: tl.constexpr, smallest: tl.constexpr, largest: tl.constexpr):
    """Δ as it will be stored, and whether its gradient passes."""
    raw = absmax * (1.0 / qmax) * clip
    scale = tl.maximum(raw, smallest)
    if stored is not None:
        scale = tl.minimum(scale, largest).to(stored).to(tl.float32)
    return tl.maximum(scale, smallest), (raw >= smallest) & (raw <= largest)


@triton.jit
def _inside(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """Where round(t) needs no clamp: a half goes to the even neighbour, which 2^(N-1) - 1 is not."""
    return (t >= qmin - 0.5) & (t < qmax + 0.5)


@triton.jit
def _by_scale(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """∂(clamp(round(x/Δ))·Δ)/∂Δ at t = x/Δ, straight through the rounding."""
    return _nearest(t, qmin, qmax) - tl.where(_inside(t, qmin, qmax), t, 0.0)


@triton.jit
def _round_rows_kernel(
    x_ptr, out_ptr, clip_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * row_stride + column[None, :], mask, 0.0).to(tl.float32)
    clip = tl.load(clip_ptr + group * clip_stride)
    scale = _scale(tl.max(tl.abs(x), 1), clip, qmax, None, smallest, 3.0e38)[0]
    rounded = _nearest(x * (1.0 / scale)[:, None], qmin, qmax) * scale[:, None]
    out = out_ptr + n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    tl.store(out, rounded.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _round_rows_gradient_kernel(
    x_ptr, grad_ptr, clip_ptr, grad_x_ptr, grad_clip_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    place = n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * row_stride + column[None, :], mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask, 0.0).to(tl.float32)
    clip = tl.load(clip_ptr + group * clip_stride)
    absmax, largest = tl.max(tl.abs(x), 1, return_indices=True)
    scale, passes = _scale(absmax, clip, qmax, None, smallest, 3.0e38)
    t = x * (1.0 / scale)[:, None]
    grad_scale = tl.where(passes, tl.sum(grad * _by_scale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
    grad_x = tl.where(_inside(t, qmin, qmax), grad, 0.0)
    grad_absmax = tl.where(x < 0, -1.0, 1.0) * (grad_scale * clip)[:, None]
    grad_x += tl.where(i[None, :] == largest[:, None], grad_absmax, 0.0)
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    tl.store(grad_clip_ptr + n * groups + group, grad_scale * absmax, n < rows)


@triton.jit
def _low_rank_rows(a_ptr, o, rows, rank: tl.constexpr, form: tl.constexpr, block_r: tl.constexpr):
    """Some rows of A; anything where there is none."""
    r = tl.arange(0, block_r)
    a = r
    if form != "none":
        a = tl.load(a_ptr + o[:, None] * rank + r[None, :], (o < rows)[:, None] & (r < rank)[None, :], 0.0)
    return a


@triton.jit
def _columns_of(
    b_ptr, s_ptr, i, columns, rank: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, block_r: tl.constexpr
):
    """Some columns of B and s2."""
    r = tl.arange(0, block_r)
    s = tl.load(s_ptr + i, i < columns, 1.0) if smoothed else tl.full(i.shape, 1.0, tl.float32)
    b = r
    if form != "none":
        b = tl.load(b_ptr + r[:, None] * columns + i[None, :], (r < rank)[:, None] & (i < columns)[None, :], 0.0)
    return b, s


@triton.jit
def _compensated(w, a, b, s, form: tl.constexpr):
    """A tile of (W ⊙ (1 + AB)) · s2."""
    x = w.to(tl.float32)
    if form != "none":
        ab = tl.dot(a, b, input_precision="ieee").to(w.dtype).to(tl.float32)
        x = x * (1.0 + ab) if form == "slrec" else x + ab
    return x * s[None, :]


@triton.jit
def _part_of_group(
    w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank: tl.constexpr, size: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Columns of a group from `start` on, in some rows: which columns, what of the tile exists, and its values."""
    within = start + tl.arange(0, block_i)
    i = group * size + within
    mask = (o < rows)[:, None] & (within < size)[None, :]
    b, s = _columns_of(b_ptr, s_ptr, i, columns, rank, form, smoothed, block_r)
    return i, mask, _compensated(tl.load(w_row + i[None, :], mask, 0.0), a, b, s, form)


@triton.jit
def _round_weight_kernel(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, out_ptr, absmax_ptr, largest_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """⟨W⟩ for some rows of one group: once through it for the largest magnitude, once more to round."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group = tl.program_id(1)
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    out_row = out_ptr + o.to(tl.int64)[:, None] * columns
    a = _low_rank_rows(a_ptr, o, rows, rank, form, block_r)
    absmax = tl.full((block_o,), -1.0, tl.float32)
    largest = tl.zeros((block_o,), tl.int32)
    for start in range(0, size, block_i):
        i, mask, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        here, place = tl.max(tl.where(mask, tl.abs(x), -1.0), 1, return_indices=True)
        largest = tl.where(here > absmax, start + place, largest)
        absmax = tl.maximum(absmax, here)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale = _scale(absmax, clip, qmax, stored, smallest, most)[0]
    tl.store(absmax_ptr + o * groups + group, absmax, o < rows)
    tl.store(largest_ptr + o * groups + group, largest, o < rows)
    for start in range(0, size, block_i):
        i, mask, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        rounded = _nearest(x * (1.0 / scale)[:, None], qmin, qmax) * scale[:, None]
        tl.store(out_row + i[None, :], rounded.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _scale_gradient_kernel(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, grad_ptr, absmax_ptr, grad_scale_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Gradient of max|x|·c, that is of Δ over 2^(N-1) - 1, for some rows of one group."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group = tl.program_id(1)
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    grad_row = grad_ptr + o.to(tl.int64)[:, None] * columns
    a = _low_rank_rows(a_ptr, o, rows, rank, form, block_r)
    absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale, passes = _scale(absmax, clip, qmax, stored, smallest, most)
    total = tl.zeros((block_o,), tl.float32)
    for start in range(0, size, block_i):
        i, mask, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        grad = tl.load(grad_row + i[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(grad * _by_scale(x * (1.0 / scale)[:, None], qmin, qmax), 1)
    tl.store(grad_scale_ptr + o * groups + group, tl.where(passes, total, 0.0) * (1.0 / qmax), o < rows)


@triton.jit
def _weight_gradient_kernel(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, grad_ptr, absmax_ptr, largest_ptr, grad_scale_ptr,
    grad_a_ptr, grad_b_ptr, grad_s_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g, steps: tl.constexpr,
    rank: tl.constexpr, size: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Gradients of A, B and s2 for a tile of columns and a part of the rows: sums that the host adds up in order."""
    part = tl.program_id(0)
    tile = tl.program_id(1)
    tiles: tl.constexpr = (size + block_i - 1) // block_i
    group = tile // tiles
    within = tile % tiles * block_i + tl.arange(0, block_i)
    i = group * size + within
    r = tl.arange(0, block_r)
    b, s = _columns_of(b_ptr, s_ptr, i, columns, rank, form, smoothed, block_r)
    grad_b = tl.zeros((block_i, block_r), tl.float32)  # transposed: tensor cores want 64 rows or more
    grad_s = tl.zeros((block_i,), tl.float32)
    for step in range(steps):
        o = (part * steps + step) * block_o + tl.arange(0, block_o)
        mask = (o < rows)[:, None] & (within < size)[None, :]
        w = tl.load(w_ptr + o.to(tl.int64)[:, None] * row_stride + i[None, :], mask, 0.0)
        grad = tl.load(grad_ptr + o.to(tl.int64)[:, None] * columns + i[None, :], mask, 0.0).to(tl.float32)
        a = _low_rank_rows(a_ptr, o, rows, rank, form, block_r)
        x = _compensated(w, a, b, s, form)
        absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
        largest = tl.load(largest_ptr + o * groups + group, o < rows, 0)
        clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
        scale, passes = _scale(absmax, clip, qmax, stored, smallest, most)
        t = x * (1.0 / scale)[:, None]
        if tiles == 1:
            grad_scale = tl.where(passes, tl.sum(grad * _by_scale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
            tl.store(grad_scale_ptr + o * groups + group, grad_scale, o < rows)
        else:
            grad_scale = tl.load(grad_scale_ptr + o * groups + group, o < rows, 0.0)
        grad_x = tl.where(_inside(t, qmin, qmax), grad, 0.0)
        grad_absmax = tl.where(x < 0, -1.0, 1.0) * (grad_scale * clip)[:, None]
        grad_x += tl.where(mask & (within[None, :] == largest[:, None]), grad_absmax, 0.0)
        grad_s += tl.sum(grad_x * x, 0)
        if form != "none":
            grad_ab = ((grad_x * w.to(tl.float32) if form == "slrec" else grad_x) * s[None, :]).to(w.dtype)
            grad_b = tl.dot(tl.trans(grad_ab), a, grad_b, input_precision="ieee")
            grad_a = tl.dot(grad_ab, tl.trans(b), input_precision="ieee")
            out = grad_a_ptr + (tile * rows + o).to(tl.int64)[:, None] * rank + r[None, :]
            tl.store(out, grad_a, (o < rows)[:, None] & (r < rank)[None, :])
    if form != "none":
        out = grad_b_ptr + (part * rank + r)[None, :] * columns + i[:, None]
        tl.store(out, grad_b, (within < size)[:, None] & (r < rank)[None, :])
    if smoothed:
        tl.store(grad_s_ptr + part * columns + i, grad_s / s, within < size)


# What the host hands over. Operators, so that torch.compile takes each as one step whose rounding nothing touches.


def take(x: Tensor, rank: int = 0) -> bool:
    """Whether these kernels take a tensor: on a GPU, no wider than what they compute in, with A and B not too large."""
    return x.is_cuda and x.dtype in STORED and rank <= MAX_RANK


_fitting: dict[Hashable, int] = {}


def _on_what_fits(case: Hashable, variants: Sequence[dict[str, int]], launch: Callable[[dict[str, int]], R]) -> R:
    """Launch the first variant for which the GPU has enough shared memory; for the same case, that one from then on."""
    while True:
        place = _fitting.setdefault(case, 0)
        try:
            return launch(variants[place])
        except OutOfResources:
            if place + 1 == len(variants):
                raise
            _fitting[case] += 1


def _rows_of(x: Tensor) -> Tensor:
    """X [..., I] as [N, I] with neighbouring columns side by side."""
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if x_NI.stride(-1) == 1 else x_NI.contiguous()


def _limits(bits: int) -> dict[str, float]:
    return {"qmin": -(2 ** (bits - 1)), "qmax": 2 ** (bits - 1) - 1, "smallest": MIN_SCALE}


def _row_blocks(size: int) -> dict[str, int]:
    block_g = triton.next_power_of_2(size)
    return {
        "size": size,
        "block_n": max(1, ROW_TILE // block_g),
        "block_g": block_g,
        "num_warps": min(16, max(4, block_g // 1024)),
    }


@torch.library.custom_op("bisup::round_rows", mutates_args=())
def round_rows(x: Tensor, clip_G: Tensor, bits: int, size: int) -> Tensor:
    """`fake_quantize` of [..., I] in groups of `size`, symmetric, with one clip value for all or for each group."""
    x_NI = _rows_of(x)
    (rows, columns), blocks = x_NI.shape, _row_blocks(size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors lie on
        _round_rows_kernel[triton.cdiv(rows, blocks["block_n"]), columns // size](
            x_NI, out, clip_G, rows, x_NI.stride(0), columns // size, int(len(clip_G) > 1), **_limits(bits), **blocks
        )
    return out


@torch.library.custom_op("bisup::round_rows_gradient", mutates_args=())
def round_rows_gradient(grad: Tensor, x: Tensor, clip_G: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the clip values."""
    x_NI = _rows_of(x)
    (rows, columns), blocks = x_NI.shape, _row_blocks(size)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_clip_NG = clip_G.new_empty(rows, columns // size)
    with torch.cuda.device_of(x):
        _round_rows_gradient_kernel[triton.cdiv(rows, blocks["block_n"]), columns // size](
            x_NI, grad.contiguous(), clip_G, grad_x, grad_clip_NG, rows, x_NI.stride(0), columns // size,
            int(len(clip_G) > 1), **_limits(bits), **blocks,
        )  # fmt: skip
    return grad_x, grad_clip_NG.sum(0) if len(clip_G) > 1 else grad_clip_NG.sum().reshape(1)


@round_rows.register_fake
def _(x, clip_G, bits, size):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@round_rows_gradient.register_fake
def _(grad, x, clip_G, bits, size):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(clip_G)


def _round_rows_backward(ctx, grad):
    return *round_rows_gradient(grad, *ctx.saved_tensors, *ctx.sizes), None, None


def _keep_rows(ctx, inputs, output):
    x, clip_G, *ctx.sizes = inputs
    ctx.save_for_backward(x, clip_G)


round_rows.register_autograd(_round_rows_backward, setup_context=_keep_rows)


# Tiles [rows, columns] and warps, as measured on an H100 (benchmarks/quantizers.py).
GROUP_BLOCKS = {"block_o": 64, "num_warps": 4}
ROW_BLOCKS = {"block_o": 32, "num_warps": 4}
GRADIENT_BLOCKS = (  # the first whose shared memory the GPU has
    {"block_o": 64, "num_warps": 4, "num_stages": 3},
    {"block_o": 64, "num_warps": 4, "num_stages": 1},
    {"block_o": 16, "num_warps": 4, "num_stages": 1},
)
MAX_RANK = 128  # of A and B; more does not fit beside a tile
MAX_BLOCK_I = 128


def _weight_arguments(
    w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None, clip: Tensor,
    bits: int, size: int, form: str, scale_dtype: torch.dtype | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What the three kernels share: the tensors that they read, sizes, and constants."""
    rank, w = 0 if a is None else a.shape[1], _rows_of(w)
    a, b = (None if matrix is None else matrix.to(w.dtype).contiguous() for matrix in (a, b))
    strides = clip.stride(0) if len(clip) > 1 else 0, int(clip.shape[1] > 1)
    sizes = dict(zip(SIZES, (*w.shape, w.stride(0), w.shape[1] // size, *strides), strict=True))
    return (w, a, b, s, clip), {
        **sizes, **_limits(bits), "rank": rank, "size": size, "form": form, "smoothed": s is not None,
        "stored": STORED[scale_dtype], "most": 3.0e38 if scale_dtype is None else torch.finfo(scale_dtype).max,
        "block_i": min(MAX_BLOCK_I, max(16, triton.next_power_of_2(size))),
        "block_r": max(16, triton.next_power_of_2(rank)),
    }  # fmt: skip


@torch.library.custom_op("bisup::round_weight", mutates_args=())
def round_weight(
    w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None, clip: Tensor,
    bits: int, size: int, form: str, scale_dtype: torch.dtype | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """⟨(W ⊙ (1 + AB)) · s⟩ [O, C] in a dtype, the largest magnitude of each group [O, G] and where it stands there.

    Args:
        w: W [O, C].
        a: A [O, R], float32, or None; it and B are multiplied in W's dtype.
        b: B [R, C] likewise.
        s: Factors of the columns [C], float32, or None.
        clip: Clip values [O, G], [1, G] or [1, 1], float32.
        bits: Width of the codes.
        size: Of a group.
        form: `slrec`, `lrec` (W + AB) or `none`.
        scale_dtype: Dtype that the scales are stored in.
        dtype: Of the result.
    """
    tensors, constants = _weight_arguments(w, a, b, s, clip, bits, size, form, scale_dtype)
    blocks = GROUP_BLOCKS if size <= MAX_BLOCK_I else ROW_BLOCKS
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    absmax = torch.empty(w.shape[0], w.shape[1] // size, dtype=torch.float32, device=w.device)
    largest = torch.empty_like(absmax, dtype=torch.int32)
    with torch.cuda.device_of(w):
        _round_weight_kernel[triton.cdiv(w.shape[0], blocks["block_o"]), absmax.shape[1]](
            *tensors, out, absmax, largest, **constants, **blocks
        )
    return out, absmax, largest


@torch.library.custom_op("bisup::round_weight_gradient", mutates_args=())
def round_weight_gradient(
    grad: Tensor, absmax: Tensor, largest: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None,
    clip: Tensor, bits: int, size: int, form: str, scale_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of A, B, s and the clip values, float32; empty where there is no such tensor."""
    tensors, constants = _weight_arguments(w, a, b, s, clip, bits, size, form, scale_dtype)
    (rows, columns), rank, grad = w.shape, constants["rank"], grad.contiguous()
    grad_scale = torch.empty_like(absmax)
    if size > MAX_BLOCK_I:  # else the next kernel sees whole groups
        with torch.cuda.device_of(w):
            _scale_gradient_kernel[triton.cdiv(rows, ROW_BLOCKS["block_o"]), absmax.shape[1]](
                *tensors, grad, absmax, grad_scale, **constants, **ROW_BLOCKS
            )
    tiles = absmax.shape[1] * triton.cdiv(size, constants["block_i"])

    def add_up(blocks: dict[str, int]) -> list[Tensor]:
        steps = triton.cdiv(rows, ROW_PARTS * blocks["block_o"])
        parts = triton.cdiv(rows, steps * blocks["block_o"])
        grad_a, grad_b = absmax.new_empty(tiles, rows, rank), absmax.new_empty(parts, rank, columns)
        grad_s = absmax.new_empty(parts, columns if s is not None else 0)
        with torch.cuda.device_of(w):
            _weight_gradient_kernel[parts, tiles](
                *tensors, grad, absmax, largest, grad_scale, grad_a, grad_b, grad_s, **constants, **blocks, steps=steps
            )
        return [part_sums.sum(0) for part_sums in (grad_a, grad_b, grad_s)]

    sums = _on_what_fits((w.device, w.dtype, rank), GRADIENT_BLOCKS, add_up)
    grad_clip = (grad_scale * absmax).sum_to_size(clip.shape)
    return sums[0], sums[1], sums[2], grad_clip


@round_weight.register_fake
def _(w, a, b, s, clip, bits, size, form, scale_dtype, dtype):
    shape = w.shape[0], w.shape[1] // size
    return (
        torch.empty(w.shape, dtype=dtype, device=w.device),
        w.new_empty(shape, dtype=torch.float32),
        w.new_empty(shape, dtype=torch.int32),
    )


@round_weight_gradient.register_fake
def _(grad, absmax, largest, w, a, b, s, clip, bits, size, form, scale_dtype):
    rank = 0 if a is None else a.shape[1]
    sizes = (w.shape[0], rank), (rank, w.shape[1]), (w.shape[1] if s is not None else 0,), clip.shape
    return tuple(absmax.new_empty(shape) for shape in sizes)


def _round_weight_backward(ctx, grad, _absmax, _largest):
    w, a, b, s, clip, absmax, largest = ctx.saved_tensors
    *found, grad_clip = round_weight_gradient(grad, absmax, largest, w, a, b, s, clip, *ctx.options[:-1])
    grads = [None if x is None else grad for x, grad in zip((a, b, s), found, strict=True)]
    return None, *grads, grad_clip, *(None,) * 5


def _keep_weight(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output[1:])


round_weight.register_autograd(_round_weight_backward, setup_context=_keep_weight)
