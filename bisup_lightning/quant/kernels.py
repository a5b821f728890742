"""Triton kernels of the two quantizers that run in every step; `operators` launches them.

What is rounded, x, and what comes out, y = ⟨x⟩, by groups of columns in each row:

    x = (W ⊙ (1 + AB)) · s2 (form `slrec`), (W + AB) · s2 (`lrec`) or W · s2 (`none`); an activation, or silu(gate) · up
    absmax = max|x| = |x_k|, k the first such column of the group      threshold = absmax · c      Δ = threshold / qmax
    t = x/Δ      q = clamp(round(t))      m = 1 where round(t) is not clamped, else 0      y = q · Δ

Gradients, with g = ∂L/∂y, pass straight through both roundings, that of t and that of Δ to its stored dtype:

    ∂L/∂Δ = Σ g · (q − m·t) over the group      ∂L/∂threshold = ∂L/∂Δ / qmax, or 0 where Δ is held in its bounds
    ∂L/∂c = absmax · ∂L/∂threshold              ∂L/∂x_i = g_i · m_i + [i = k] · sign(x_k) · c · ∂L/∂threshold
    ∂L/∂(AB) = ∂L/∂x ⊙ ∂x/∂(AB), where ∂x/∂(AB) = W · s2 (`slrec`) or s2 (`lrec`)
    ∂L/∂A = ∂L/∂(AB) · Bᵀ      ∂L/∂B = Aᵀ · ∂L/∂(AB)
    ∂L/∂s2 = Σ_o (∂L/∂x ⊙ x) / s2 = (Σ_o ∂L/∂x ⊙ W · s2 + Σ_r B ⊙ ∂L/∂B) / s2

Parameters of the kernels, beside tensors (`…_ptr`), their sizes and strides:

    size, groups          columns of a group, groups of a row
    parts, span           programs that share a long group, and the columns that each takes; else 1 and `size`
    row_part, steps       a run of rows, whose gradients of B and s2 are summed up apart; tiles of rows in a run
    block_*               sides of a program's tile, powers of two: n or o rows, i or g columns, r ranks, p parts
    signed_argmax         2k where x_k is positive, 2k + 1 where it is negative
    stored                dtype that Δ is rounded to, as it is on disk; None for float32, as it is computed
    scale_min, scale_max  bounds of Δ
    smoothed, coded       whether there is an s2; whether codes q and scales Δ are wanted, too

Dimensions in shapes: O output rows, N rows of any kind, G groups, R rank.
"""

import triton
import triton.language as tl

UNLIMITED = tl.constexpr(3.0e38)  # the scale_max of a Δ that stays float32


@triton.jit
def _limited(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """The quotient t limited so that it rounds to a valid code; NaN stays NaN.

    Ties round to even: qmin - ½ to qmin, which is even; but qmax + ½ would round to qmax + 1, as qmax is odd. So the
    upper bound is the float32 number just below qmax + ½.
    """
    return tl.clamp(t, qmin - 0.5, (qmax + 0.5) * (1 - 2**-24), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nearest_code(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """Code q = clamp(round(t)), halves to even: near 1.5 · 2^23, float32 holds only integers: the sum is rounded."""
    return (_limited(t, qmin, qmax) + 12582912.0) - 12582912.0


@triton.jit
def _scale(absmax, clip, qmax: tl.constexpr, stored: tl.constexpr, scale_min: tl.constexpr, scale_max: tl.constexpr):
    """Δ as it will be stored, and whether its gradient passes: not where it is held in its bounds."""
    raw = absmax * (1.0 / qmax) * clip
    scale = tl.maximum(raw, scale_min)
    if stored is not None:
        scale = tl.minimum(scale, scale_max).to(stored).to(tl.float32)
    return tl.maximum(scale, scale_min), (raw >= scale_min) & (raw <= scale_max)


@triton.jit
def _unclamped(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """Where m = 1: round(t) is a valid code without being clamped."""
    return t == _limited(t, qmin, qmax)


@triton.jit
def _dy_dscale(t, qmin: tl.constexpr, qmax: tl.constexpr):
    """∂y/∂Δ = q − m·t, straight through the rounding."""
    return _nearest_code(t, qmin, qmax) - tl.where(_unclamped(t, qmin, qmax), t, 0.0)


@triton.jit
def _absmax(x, i):
    """Absmax and signed_argmax of each row; i are the columns' numbers within the group."""
    absmax = tl.max(tl.abs(x), 1)
    signed_index = 2 * i[None, :] - (x.to(tl.int32, bitcast=True) >> 31)  # the shifted sign bit is 0 or -1
    return absmax, tl.min(tl.where(tl.abs(x) == absmax[:, None], signed_index, 2147483647), 1)


@triton.jit
def _add_gradient_of_absmax(grad_x, i, signed_argmax, grad_absmax):
    """Returns ∂L/∂x plus, at each row's x_k alone, the gradient that flows through Δ: sign(x_k) · ∂L/∂absmax."""
    grad_x_k = tl.where(signed_argmax % 2 == 1, -grad_absmax, grad_absmax)
    return tl.where(2 * i[None, :] == (signed_argmax & -2)[:, None], grad_x + grad_x_k[:, None], grad_x)


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """silu(gate) as a tensor of that dtype would hold it."""
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@triton.jit
def _load_rows(x_ptr, up_ptr, offsets, mask):
    """Returns x, up, and what is rounded: silu(x) · up, or x where there is no up (which then stands in for it)."""
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    up = x
    product = x
    if up_ptr is not None:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        up = tl.load(up_ptr + offsets, mask, 0.0).to(tl.float32)
        product = (_silu(x, dtype) * up).to(dtype).to(tl.float32)
    return x, up, product


@triton.jit
def round_rows(
    x_ptr, up_ptr, clip_ptr, out_ptr, codes_ptr, scale_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr, coded: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    """⟨x⟩, or ⟨silu(x) · up⟩, for some rows of one group; if `coded`, also its codes, and their scales [G, N]."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    x_offsets = n.to(tl.int64)[:, None] * row_stride + column[None, :]
    x = _load_rows(x_ptr, up_ptr, x_offsets, mask)[2]
    clip = tl.load(clip_ptr + group * clip_stride)
    scale = _scale(tl.max(tl.abs(x), 1), clip, qmax, None, scale_min, UNLIMITED)[0]
    codes = _nearest_code(x * (1.0 / scale)[:, None], qmin, qmax)
    out_offsets = n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    tl.store(out_ptr + out_offsets, (codes * scale[:, None]).to(out_ptr.dtype.element_ty), mask)
    if coded:
        tl.store(codes_ptr + out_offsets, codes.to(codes_ptr.dtype.element_ty), mask)
        tl.store(scale_ptr + group * rows + n, scale, n < rows)


@triton.jit
def round_rows_gradient(
    x_ptr, up_ptr, grad_ptr, clip_ptr, grad_x_ptr, grad_up_ptr, grad_clip_ptr, rows, row_stride, groups, clip_stride,
    size: tl.constexpr, qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr,
    block_n: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of up if there is one, and of the clip values [N, G], for some rows of one group."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    group = tl.program_id(1)
    i = tl.arange(0, block_g)
    mask = (n < rows)[:, None] & (i < size)[None, :]
    column = group * size + i
    out_offsets = n.to(tl.int64)[:, None] * (groups * size) + column[None, :]
    x_offsets = n.to(tl.int64)[:, None] * row_stride + column[None, :]
    x = _load_rows(x_ptr, up_ptr, x_offsets, mask)[2]
    grad = tl.load(grad_ptr + out_offsets, mask, 0.0).to(tl.float32)
    clip = tl.load(clip_ptr + group * clip_stride)
    absmax, signed_argmax = _absmax(x, i)
    scale, passes = _scale(absmax, clip, qmax, None, scale_min, UNLIMITED)
    t = x * (1.0 / scale)[:, None]
    grad_threshold = tl.where(passes, tl.sum(grad * _dy_dscale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
    tl.store(grad_clip_ptr + n * groups + group, grad_threshold * absmax, n < rows)
    gate = x
    up = x
    if up_ptr is not None:  # read again, after a store: of a long row, registers do not hold all of this until here
        gate, up, x = _load_rows(x_ptr, up_ptr, x_offsets, mask)
        grad = tl.load(grad_ptr + out_offsets, mask, 0.0).to(tl.float32)
        t = x * (1.0 / scale)[:, None]
    grad_x = tl.where(_unclamped(t, qmin, qmax), grad, 0.0)
    grad_x = _add_gradient_of_absmax(grad_x, i, signed_argmax, grad_threshold * clip)
    if up_ptr is not None:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        grad_product = grad_x.to(dtype).to(tl.float32)
        tl.store(grad_up_ptr + out_offsets, (grad_product * _silu(gate, dtype)).to(dtype), mask)
        sigmoid = tl.sigmoid(gate)
        grad_x = (grad_product * up).to(dtype).to(tl.float32) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_x_ptr + out_offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


@triton.jit
def _load_a(w_ptr, a_ptr, o, rows, rank: tl.constexpr, form: tl.constexpr, block_r: tl.constexpr):
    """Some rows of A in W's dtype; where there is no A, a placeholder that nothing reads."""
    r = tl.arange(0, block_r)
    a = r
    if form != "none":
        dtype: tl.constexpr = w_ptr.dtype.element_ty
        a = tl.load(a_ptr + o[:, None] * rank + r[None, :], (o < rows)[:, None] & (r < rank)[None, :], 0.0).to(dtype)
    return a


@triton.jit
def _load_b_and_s(
    b_ptr, s_ptr, i, columns, rank: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, dtype: tl.constexpr,
    block_r: tl.constexpr,
):  # fmt: skip
    """Some columns of B in W's dtype, or a placeholder, and of s2, or ones."""
    r = tl.arange(0, block_r)
    s = tl.load(s_ptr + i, i < columns, 1.0) if smoothed else tl.full(i.shape, 1.0, tl.float32)
    b = r
    if form != "none":
        b = tl.load(b_ptr + r[:, None] * columns + i[None, :], (r < rank)[:, None] & (i < columns)[None, :], 0.0)
        b = b.to(dtype)
    return b, s


@triton.jit
def _compensated(w, a, b, s, form: tl.constexpr):
    """Returns x, W · s2 and ∂x/∂(AB) for a tile of W."""
    w_s = w.to(tl.float32) * s[None, :]
    dx_dab = w_s if form == "slrec" else s[None, :]
    x = w_s
    if form != "none":
        x += dx_dab * tl.dot(a, b, input_precision="ieee")
    return x, w_s, dx_dab


@triton.jit
def _load_x(
    w_row, a, b_ptr, s_ptr, o, group, start, rows, columns, rank: tl.constexpr, size: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Values x in some rows and in a group's columns from `start` on.

    Returns the columns' numbers in W and in the group, the mask of elements that exist, and x, 0 elsewhere.
    """
    within = start + tl.arange(0, block_i)
    i = group * size + within
    mask = (o < rows)[:, None] & (within < size)[None, :]
    w = tl.load(w_row + i[None, :], mask, 0.0)
    b, s = _load_b_and_s(b_ptr, s_ptr, i, columns, rank, form, smoothed, w.dtype, block_r)
    x = _compensated(w, a, b, s, form)[0]
    if size != block_i:  # AB goes on into the next group
        x = tl.where((within < size)[None, :], x, 0.0)
    return i, within, mask, x


@triton.jit
def absmax_of_parts(
    w_ptr, a_ptr, b_ptr, s_ptr, part_absmax_ptr, part_signed_argmax_ptr, rows, columns, row_stride,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Absmax and signed_argmax [G · parts, O] of a part of a long group, for some rows."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    a = _load_a(w_ptr, a_ptr, o, rows, rank, form, block_r)
    absmax = tl.full((block_o,), -1.0, tl.float32)
    signed_argmax = tl.zeros((block_o,), tl.int32)
    for start in range(0, span, block_i):
        at = part * span + start
        _, within, _, x = _load_x(
            w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        tile_absmax, tile_signed_argmax = _absmax(x, within)
        signed_argmax = tl.where(tile_absmax > absmax, tile_signed_argmax, signed_argmax)
        absmax = tl.maximum(absmax, tile_absmax)
    tl.store(part_absmax_ptr + tl.program_id(1) * rows + o, absmax, o < rows)
    tl.store(part_signed_argmax_ptr + tl.program_id(1) * rows + o, signed_argmax, o < rows)


@triton.jit
def round_weight(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, part_absmax_ptr, part_signed_argmax_ptr,
    out_ptr, absmax_ptr, signed_argmax_ptr, codes_ptr, scale_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr, scale_max: tl.constexpr, coded: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    """Rounded weight y, for some rows of a group, or of a part of a long one, after `absmax_of_parts` saw all of it."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    start_of_row = o.to(tl.int64)[:, None] * columns
    a = _load_a(w_ptr, a_ptr, o, rows, rank, form, block_r)
    if size <= block_i:  # the tile is the whole group
        i, within, mask, x = _load_x(
            w_row, a, b_ptr, s_ptr, o, group, 0, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        absmax, signed_argmax = _absmax(x, within)
    else:
        p = tl.arange(0, block_p)
        exists = (o < rows)[:, None] & (p < parts)[None, :]
        offsets = (group * parts + p)[None, :] * rows + o[:, None]
        absmax, winner = tl.max(tl.load(part_absmax_ptr + offsets, exists, -1.0), 1, return_indices=True)
        part_signed_argmax = tl.load(part_signed_argmax_ptr + offsets, exists, 0)
        signed_argmax = tl.sum(tl.where(p[None, :] == winner[:, None], part_signed_argmax, 0), 1)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale = _scale(absmax, clip, qmax, stored, scale_min, scale_max)[0]
    if part == 0:
        tl.store(absmax_ptr + o * groups + group, absmax, o < rows)
        tl.store(signed_argmax_ptr + o * groups + group, signed_argmax, o < rows)
        if coded:
            tl.store(scale_ptr + group * rows + o, scale, o < rows)
    for start in range(0, span, block_i):
        if size > block_i:
            at = part * span + start
            i, _, mask, x = _load_x(
                w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
            )
        codes = _nearest_code(x * (1.0 / scale)[:, None], qmin, qmax)
        tl.store(out_ptr + start_of_row + i[None, :], (codes * scale[:, None]).to(out_ptr.dtype.element_ty), mask)
        if coded:
            tl.store(codes_ptr + start_of_row + i[None, :], codes.to(codes_ptr.dtype.element_ty), mask)


@triton.jit
def threshold_gradient(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, grad_ptr, absmax_ptr, part_grad_threshold_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g,
    rank: tl.constexpr, size: tl.constexpr, parts: tl.constexpr, span: tl.constexpr,
    form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr, scale_max: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Each part's share of ∂L/∂threshold [G · parts, O] of a long group, for some rows; the host adds them up."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride
    grad_row = grad_ptr + o.to(tl.int64)[:, None] * columns
    a = _load_a(w_ptr, a_ptr, o, rows, rank, form, block_r)
    absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
    clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
    scale, passes = _scale(absmax, clip, qmax, stored, scale_min, scale_max)
    total = tl.zeros((block_o,), tl.float32)
    for start in range(0, span, block_i):
        at = part * span + start
        i, _, mask, x = _load_x(
            w_row, a, b_ptr, s_ptr, o, group, at, rows, columns, rank, size, form, smoothed, block_i, block_r
        )
        grad = tl.load(grad_row + i[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(grad * _dy_dscale(x * (1.0 / scale)[:, None], qmin, qmax), 1)
    tl.store(
        part_grad_threshold_ptr + tl.program_id(1) * rows + o, tl.where(passes, total, 0.0) * (1.0 / qmax), o < rows
    )


@triton.jit
def weight_gradient(
    w_ptr, a_ptr, b_ptr, s_ptr, clip_ptr, grad_ptr, absmax_ptr, signed_argmax_ptr, grad_threshold_ptr,
    grad_a_ptr, grad_b_ptr, grad_s_ptr,
    rows, columns, row_stride, groups, clip_stride_o, clip_stride_g, steps: tl.constexpr,
    rank: tl.constexpr, size: tl.constexpr, form: tl.constexpr, smoothed: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr, scale_max: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    """Gradients of A, B and s2 from a tile of columns (of all tiles, side by side) and a part of the rows.

    A program sums over its own columns (∂L/∂A: [tiles, O, R]) and over its own rows (∂L/∂B: [row parts, R, I], ∂L/∂s2:
    [row parts, I]); the host adds these sums up, always in the same order. Where a tile is a whole group, ∂L/∂threshold
    [O, G] is computed and stored here; otherwise it is read.
    """
    row_part = tl.program_id(0)
    tile = tl.program_id(1)
    tiles_per_group: tl.constexpr = (size + block_i - 1) // block_i
    group = tile // tiles_per_group
    within = tile % tiles_per_group * block_i + tl.arange(0, block_i)
    i = group * size + within
    r = tl.arange(0, block_r)
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    b, s = _load_b_and_s(b_ptr, s_ptr, i, columns, rank, form, smoothed, dtype, block_r)
    # Tensor cores sum over o. As they want products of 64 rows or more, the sums are held transposed: i comes first.
    grad_b = tl.zeros((block_i, block_r), tl.float32)
    sum_grad_x_w_s = tl.zeros((block_i, 16), tl.float32)  # Σ_o ∂L/∂x ⊙ W · s2, 16 times: no product is narrower
    ones = tl.full((block_o, 16), 1.0, dtype)
    for step in range(steps):
        o = (row_part * steps + step) * block_o + tl.arange(0, block_o)
        mask = (o < rows)[:, None] & (within < size)[None, :]
        w = tl.load(w_ptr + o.to(tl.int64)[:, None] * row_stride + i[None, :], mask, 0.0)
        grad = tl.load(grad_ptr + o.to(tl.int64)[:, None] * columns + i[None, :], mask, 0.0).to(tl.float32)
        a = _load_a(w_ptr, a_ptr, o, rows, rank, form, block_r)
        x, w_s, dx_dab = _compensated(w, a, b, s, form)
        absmax = tl.load(absmax_ptr + o * groups + group, o < rows, 0.0)
        signed_argmax = tl.load(signed_argmax_ptr + o * groups + group, o < rows, 0)
        clip = tl.load(clip_ptr + o * clip_stride_o + group * clip_stride_g, o < rows, 1.0)
        scale, passes = _scale(absmax, clip, qmax, stored, scale_min, scale_max)
        t = x * (1.0 / scale)[:, None]
        grad_x = tl.where(_unclamped(t, qmin, qmax), grad, 0.0)
        if tiles_per_group == 1:
            grad_threshold = tl.where(passes, tl.sum(grad * _dy_dscale(t, qmin, qmax), 1), 0.0) * (1.0 / qmax)
            tl.store(grad_threshold_ptr + o * groups + group, grad_threshold, o < rows)
        else:
            grad_threshold = tl.load(grad_threshold_ptr + o * groups + group, o < rows, 0.0)
        grad_x = _add_gradient_of_absmax(grad_x, within, signed_argmax, grad_threshold * clip)
        if form != "none":
            grad_ab = (grad_x * dx_dab).to(dtype)
            grad_b = tl.dot(tl.trans(grad_ab), a, grad_b, input_precision="ieee")
            grad_a = tl.dot(grad_ab, tl.trans(b), input_precision="ieee")
            out = grad_a_ptr + (tile * rows + o).to(tl.int64)[:, None] * rank + r[None, :]
            tl.store(out, grad_a, (o < rows)[:, None] & (r < rank)[None, :])
        if smoothed:
            grad_x_w_s = grad_ab if form == "slrec" else (grad_x * w_s).to(dtype)
            sum_grad_x_w_s = tl.dot(tl.trans(grad_x_w_s), ones, sum_grad_x_w_s, input_precision="ieee")
    grad_s = tl.max(sum_grad_x_w_s, 1)  # any of the 16
    if form != "none":
        out = grad_b_ptr + (row_part * rank + r)[None, :] * columns + i[:, None]
        tl.store(out, grad_b, (within < size)[:, None] & (r < rank)[None, :])
        grad_s += tl.sum(grad_b * tl.trans(b).to(tl.float32), 1)  # Σ_o ∂L/∂(AB) ⊙ AB
    if smoothed:
        tl.store(grad_s_ptr + row_part * columns + i, grad_s / s, within < size)


@triton.jit
def clip_errors(
    w_ptr, clip_ptr, error_ptr, rows, row_stride, groups,
    candidates: tl.constexpr, size: tl.constexpr, stored: tl.constexpr,
    qmin: tl.constexpr, qmax: tl.constexpr, scale_min: tl.constexpr, scale_max: tl.constexpr,
    block_o: tl.constexpr, block_i: tl.constexpr,
):  # fmt: skip
    """Squared error of rounding W with each candidate of a clip value [candidates, O, G], for some rows of a group."""
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    group = tl.program_id(1)
    w_row = w_ptr + o.to(tl.int64)[:, None] * row_stride + group * size
    absmax = tl.zeros((block_o,), tl.float32)
    for start in range(0, size, block_i):
        i = start + tl.arange(0, block_i)
        x = tl.load(w_row + i[None, :], (o < rows)[:, None] & (i < size)[None, :], 0.0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.max(tl.abs(x), 1))
    for candidate in range(candidates):
        scale = _scale(absmax, tl.load(clip_ptr + candidate), qmax, stored, scale_min, scale_max)[0]
        error = tl.zeros((block_o,), tl.float32)
        for start in range(0, size, block_i):
            i = start + tl.arange(0, block_i)
            x = tl.load(w_row + i[None, :], (o < rows)[:, None] & (i < size)[None, :], 0.0).to(tl.float32)
            deviation = _nearest_code(x * (1.0 / scale)[:, None], qmin, qmax) * scale[:, None] - x
            error += tl.sum(deviation * deviation, 1)
        tl.store(error_ptr + (candidate * rows + o).to(tl.int64) * groups + group, error, o < rows)
