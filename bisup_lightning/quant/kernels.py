"""Triton kernels of the two quantizers that run in every step; `operators` launches them.

Names: o output rows, i input features, n rows of any kind, r rank, g elements of a group.
"""

import triton
import triton.language as tl


@triton.jit
def _within_reach(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """T clamped to what rounds to a code: halves go to even, which 2^(N-1) - 1 is not. NaN stays NaN."""
    return tl.clamp(t, qmin - 0.5, (qmax + 0.5) * (1 - 2**-24), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nearest(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """clamp(round(t)), halves to even: adding 1.5 · 2^23 leaves no bits behind the point."""
    return (_within_reach(t, qmin, qmax) + 12582912.0) - 12582912.0


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
    """Where round(t) needs no clamp."""
    return t == _within_reach(t, qmin, qmax)


@triton.jit
def _by_scale(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """∂(clamp(round(x/Δ))·Δ)/∂Δ at t = x/Δ, straight through the rounding."""
    return _nearest(t, qmin, qmax) - tl.where(_inside(t, qmin, qmax), t, 0.0)


@triton.jit
def _largest(x, i):
    """Largest magnitude of each row, and the first of the places i that has it: as 2i, or 2i + 1 if it is negative."""
    absmax = tl.max(tl.abs(x), 1)
    place = 2 * i[None, :] - (x.to(tl.int32, bitcast=True) >> 31)
    return absmax, tl.min(tl.where(tl.abs(x) == absmax[:, None], place, 2147483647), 1)


@triton.jit
def _with_share_of_largest(grad_x, i, largest, grad_absmax):
    """Gradients of x, with what the largest of a row, ±absmax, has from the row's scale."""
    grad_largest = tl.where(largest % 2 == 1, -grad_absmax, grad_absmax)
    return tl.where(2 * i[None, :] == (largest & -2)[:, None], grad_x + grad_largest[:, None], grad_x)


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """silu(gate) as a tensor of that dtype would hold it."""
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@triton.jit
def _given_rows(x_ptr, up_ptr, given, mask):
    """X and, if there is an up, it; and what is to be rounded, which is x or silu(x) · up."""
    x = tl.load(x_ptr + given, mask, 0.0).to(tl.float32)
    up = x
    product = x
    if up_ptr is not None:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        up = tl.load(up_ptr + given, mask, 0.0).to(tl.float32)
        product = (_silu(x, dtype) * up).to(dtype).to(tl.float32)
    return x, up, product


@triton.jit
def round_rows(
    x_ptr, up_ptr, clip_ptr, out_ptr, codes_ptr, scale_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, coded: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    """⟨x⟩, or ⟨silu(x) · up⟩, for some rows of one group; `coded`: also its codes, and their scales [G, N]."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    given = n.to(tl.int64)[:, None] * row_stride + column[None, :]
    x = _given_rows(x_ptr, up_ptr, given, mask)[2]
    clip = tl.load(clip_ptr + group * clip_stride)
    scale = _scale(tl.max(tl.abs(x), 1), clip, qmax, None, smallest, 3.0e38)[0]
    codes = _nearest(x * (1.0 / scale)[:, None], qmin, qmax)
    place = n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    tl.store(out_ptr + place, (codes * scale[:, None]).to(out_ptr.dtype.element_ty), mask)
    if coded:
        tl.store(codes_ptr + place, codes.to(codes_ptr.dtype.element_ty), mask)
        tl.store(scale_ptr + group * rows + n, scale, n < rows)


@triton.jit
def round_rows_gradient(
    x_ptr, up_ptr, grad_ptr, clip_ptr, grad_x_ptr, grad_up_ptr, grad_clip_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of up if there is one, and of the clip values, for some rows of one group."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    place = n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    given = n.to(tl.int64)[:, None] * row_stride + column[None, :]
    x = _given_rows(x_ptr, up_ptr, given, mask)[2]
    grad = tl.load(grad_ptr + place, mask, 0.0).to(tl.float32)
    clip = tl.load(clip_ptr + group * clip_stride)
    absmax, largest = _largest(x, i)
    scale, passes = _scale(absmax, clip, qmax, None, smallest, 3.0e38)
    t = x * (1.0 / scale)[:, None]
    grad_scale = tl.where(passes, tl.sum(grad * _by_scale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
    tl.store(grad_clip_ptr + n * groups + group, grad_scale * absmax, n < rows)
    gate = x
    up = x
    if up_ptr is not None:  # read again, behind a store: registers do not hold all that for a long row
        gate, up, x = _given_rows(x_ptr, up_ptr, given, mask)
        grad = tl.load(grad_ptr + place, mask, 0.0).to(tl.float32)
        t = x * (1.0 / scale)[:, None]
    grad_x = tl.where(_inside(t, qmin, qmax), grad, 0.0)
    grad_x = _with_share_of_largest(grad_x, i, largest, grad_scale * clip)
    if up_ptr is not None:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        grad_product = grad_x.to(dtype).to(tl.float32)
        tl.store(grad_up_ptr + place, (grad_product * _silu(gate, dtype)).to(dtype), mask)
        sigmoid = tl.sigmoid(gate)
        grad_x = (grad_product * up).to(dtype).to(tl.float32) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


@triton.jit
def _low_rank_rows(w_ptr, a_ptr, o, rows, rank: tl.constexpr, form: tl.constexpr, block_r: tl.constexpr):
    """Some rows of A in W's dtype; anything where there is none."""
    r = tl.arange(0, block_r)
    a = r
    if form != "none":
        dtype: tl.constexpr = w_ptr.dtype.element_ty
        a = tl.load(a_ptr + o[:, None] * rank + r[None, :], (o < rows)[:, None] & (r < rank)[None, :], 0.0).to(dtype)
    return a


@triton.jit
def _columns_of(
    b_ptr, s_ptr, i, columns, rank: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, dtype: tl.constexpr,
    block_r: tl.constexpr,
):  # fmt: skip
    """Some columns of B in W's dtype, and of s2."""
    r = tl.arange(0, block_r)
    s = tl.load(s_ptr + i, i < columns, 1.0) if smoothed else tl.full(i.shape, 1.0, tl.float32)
    b = r
    if form != "none":
        b = tl.load(b_ptr + r[:, None] * columns + i[None, :], (r < rank)[:, None] & (i < columns)[None, :], 0.0)
        b = b.to(dtype)
    return b, s


@triton.jit
def _compensated(w, a, b, s, form: tl.constexpr):
    """A tile of (W ⊙ (1 + AB)) · s2 or (W + AB) · s2, what of it W · s2 is, and what AB is multiplied by in it."""
    scaled = w.to(tl.float32) * s[None, :]
    by_ab = scaled if form == "slrec" else s[None, :]
    x = scaled
    if form != "none":
        x += by_ab * tl.dot(a, b, input_precision="ieee")
    return x, scaled, by_ab


@triton.jit
def _part_of_group(
    w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank: tl.constexpr, size: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Columns of a group from `start` on, in some rows: which, also in the group, what exists, and its values."""
    within = start + tl.arange(0, block_i)
    i = group * size + within
    mask = (o < rows)[:, None] & (within < size)[None, :]
    w = tl.load(w_row + i[None, :], mask, 0.0)
    b, s = _columns_of(b_ptr, s_ptr, i, columns, rank, form, smoothed, w.dtype, block_r)
    x = _compensated(w, a, b, s, form)[0]
    if size != block_i:  # AB goes on into the next group
        x = tl.where((within < size)[None, :], x, 0.0)
    return i, within, mask, x


@triton.jit
def largest_of_parts(
    w_ptr, a_ptr, b_ptr, s_ptr, part_absmax_ptr, part_largest_ptr, rows, columns, row_stride,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Largest magnitude in a part of a long group, and where it stands in the group, for some rows: [G · parts, O]."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    a = _low_rank_rows(w_ptr, a_ptr, o, rows, rank, form, block_r)
    absmax = tl.full((block_o,), -1.0, tl.float32)
    largest = tl.zeros((block_o,), tl.int32)
    for start in range(0, span, block_i):
        at = part * span + start
        _, within, _, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        here, place = _largest(x, within)
        largest = tl.where(here > absmax, place, largest)
        absmax = tl.maximum(absmax, here)
    tl.store(part_absmax_ptr + tl.program_id(1) * rows + o, absmax, o < rows)
    tl.store(part_largest_ptr + tl.program_id(1) * rows + o, largest, o < rows)


@triton.jit
def round_weight(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, part_absmax_ptr, part_largest_ptr,
    out_ptr, absmax_ptr, largest_ptr, codes_ptr, scale_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr, coded: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    """⟨W⟩ for some rows of a group, or of a part of a long one, whose largest magnitude `largest_of_parts` found."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    start_of_row = o.to(tl.int64)[:, None] * columns
    a = _low_rank_rows(w_ptr, a_ptr, o, rows, rank, form, block_r)
    if size <= block_i:  # all of it is here
        i, within, mask, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, 0, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        absmax, largest = _largest(x, within)
    else:
        p = tl.arange(0, block_p)
        there = (o < rows)[:, None] & (p < parts)[None, :]
        found = (group * parts + p)[None, :] * rows + o[:, None]
        absmax, winner = tl.max(tl.load(part_absmax_ptr + found, there, -1.0), 1, return_indices=True)
        places = tl.load(part_largest_ptr + found, there, 0)
        largest = tl.sum(tl.where(p[None, :] == winner[:, None], places, 0), 1)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale = _scale(absmax, clip, qmax, stored, smallest, most)[0]
    if part == 0:
        tl.store(absmax_ptr + o * groups + group, absmax, o < rows)
        tl.store(largest_ptr + o * groups + group, largest, o < rows)
        if coded:
            tl.store(scale_ptr + group * rows + o, scale, o < rows)
    for start in range(0, span, block_i):
        if size > block_i:
            at = part * span + start
            i, _, mask, x = _part_of_group(
                w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
            )
        codes = _nearest(x * (1.0 / scale)[:, None], qmin, qmax)
        tl.store(out_ptr + start_of_row + i[None, :], (codes * scale[:, None]).to(out_ptr.dtype.element_ty), mask)
        if coded:
            tl.store(codes_ptr + start_of_row + i[None, :], codes.to(codes_ptr.dtype.element_ty), mask)


@triton.jit
def scale_gradient(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, grad_ptr, absmax_ptr, part_grad_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Gradient of max|x|·c, that is of Δ over 2^(N-1) - 1, for some rows, by parts of a long group: [G · parts, O]."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    grad_row = grad_ptr + o.to(tl.int64)[:, None] * columns
    a = _low_rank_rows(w_ptr, a_ptr, o, rows, rank, form, block_r)
    absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale, passes = _scale(absmax, clip, qmax, stored, smallest, most)
    total = tl.zeros((block_o,), tl.float32)
    for start in range(0, span, block_i):
        at = part * span + start
        i, _, mask, x = _part_of_group(
            w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        grad = tl.load(grad_row + i[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(grad * _by_scale(x * (1.0 / scale)[:, None], qmin, qmax), 1)
    tl.store(part_grad_ptr + tl.program_id(1) * rows + o, tl.where(passes, total, 0.0) * (1.0 / qmax), o < rows)


@triton.jit
def weight_gradient(
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
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    b, s = _columns_of(b_ptr, s_ptr, i, columns, rank, form, smoothed, dtype, block_r)
    # Tensor cores add up columns: transposed, as they want 64 rows or more.
    grad_b = tl.zeros((block_i, block_r), tl.float32)
    grad_scaled = tl.zeros((block_i, 16), tl.float32)  # Σ ∂/∂(W · s2) · W · s2, 16 times
    ones = tl.full((block_o, 16), 1.0, dtype)
    for step in range(steps):
        o = (part * steps + step) * block_o + tl.arange(0, block_o)
        mask = (o < rows)[:, None] & (within < size)[None, :]
        w = tl.load(w_ptr + o.to(tl.int64)[:, None] * row_stride + i[None, :], mask, 0.0)
        grad = tl.load(grad_ptr + o.to(tl.int64)[:, None] * columns + i[None, :], mask, 0.0).to(tl.float32)
        a = _low_rank_rows(w_ptr, a_ptr, o, rows, rank, form, block_r)
        x, scaled, by_ab = _compensated(w, a, b, s, form)
        absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
        largest = tl.load(largest_ptr + o * groups + group, o < rows, 0)
        clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
        scale, passes = _scale(absmax, clip, qmax, stored, smallest, most)
        t = x * (1.0 / scale)[:, None]
        grad_x = tl.where(_inside(t, qmin, qmax), grad, 0.0)
        if tiles == 1:
            grad_scale = tl.where(passes, tl.sum(grad * _by_scale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
            tl.store(grad_scale_ptr + o * groups + group, grad_scale, o < rows)
        else:
            grad_scale = tl.load(grad_scale_ptr + o * groups + group, o < rows, 0.0)
        grad_x = _with_share_of_largest(grad_x, within, largest, grad_scale * clip)
        if form != "none":
            grad_ab = (grad_x * by_ab).to(dtype)
            grad_b = tl.dot(tl.trans(grad_ab), a, grad_b, input_precision="ieee")
            grad_a = tl.dot(grad_ab, tl.trans(b), input_precision="ieee")
            out = grad_a_ptr + (tile * rows + o).to(tl.int64)[:, None] * rank + r[None, :]
            tl.store(out, grad_a, (o < rows)[:, None] & (r < rank)[None, :])
        if smoothed:
            by_scaled = grad_ab if form == "slrec" else (grad_x * scaled).to(dtype)
            grad_scaled = tl.dot(tl.trans(by_scaled), ones, grad_scaled, input_precision="ieee")
    grad_s = tl.max(grad_scaled, 1)
    if form != "none":
        out = grad_b_ptr + (part * rank + r)[None, :] * columns + i[:, None]
        tl.store(out, grad_b, (within < size)[:, None] & (r < rank)[None, :])
        grad_s += tl.sum(grad_b * tl.trans(b).to(tl.float32), 1)  # Σ ∂/∂(AB) · AB
    if smoothed:
        tl.store(grad_s_ptr + part * columns + i, grad_s / s, within < size)


@triton.jit
def clip_errors(
    w_ptr, clip_ptr, error_ptr, rows, row_stride, groups,
    candidates: tl.constexpr, size: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, smallest: tl.constexpr, most: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr,
):  # fmt: skip
    """Squared error of rounding W with each clip value, for some rows of a group: [candidates, O, G]."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group = tl.program_id(1)
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride + group * size
    absmax = tl.zeros((block_o,), tl.float32)
    for start in range(0, size, block_i):
        i = start + tl.arange(0, block_i)
        x = tl.load(w_row + i[None, :], (o < rows)[:, None] & (i < size)[None, :], 0.0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.max(tl.abs(x), 1))
    for candidate in range(candidates):
        scale = _scale(absmax, tl.load(clip_ptr + candidate), qmax, stored, smallest, most)[0]
        error = tl.zeros((block_o,), tl.float32)
        for start in range(0, size, block_i):
            i = start + tl.arange(0, block_i)
            x = tl.load(w_row + i[None, :], (o < rows)[:, None] & (i < size)[None, :], 0.0).to(tl.float32)
            off = _nearest(x * (1.0 / scale)[:, None], qmin, qmax) * scale[:, None] - x
            error += tl.sum(off * off, 1)
        tl.store(error_ptr + (candidate * rows + o).to(tl.int64) * groups + group, error, o < rows)
