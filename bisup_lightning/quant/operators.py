"""The quantizers that run in every step as operators around Triton kernels: the same sums as `affine`, in few passes.

Autograd's composition moves a weight through memory a dozen times in a step, and compiled code still half as often;
these kernels read it, and its gradient, once or twice. torch.compile takes each operator as one step whose rounding
nothing touches. The formulas stand in `kernels`.

Shape suffixes: O output rows, I input features, G groups of g elements each, R rank, N rows of any kind, C columns of
a segment, K candidates of a clip value. A segment is a range of columns, passed as a view: rows may be strided.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from bisup_lightning.quant.spec import MIN_SCALE

HAS_TRITON = find_spec("triton") is not None  # PyTorch for CUDA requires it, PyTorch for CPUs does not
if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources

    from bisup_lightning.quant import kernels

    STORED = {None: None, torch.float32: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

R = TypeVar("R")

ROW_TILE = 4096  # elements of an activation that a program holds
ROW_PARTS = 8  # into which a weight's rows are split, to add up its gradients side by side
SIZES = ("rows", "columns", "row_stride", "groups", "clip_stride_o", "clip_stride_g")


def supports(x: Tensor, rank: int = 0) -> bool:
    """Whether the operators run on a tensor: on a GPU, no wider than float32, with A and B not too large."""
    return HAS_TRITON and x.is_cuda and x.dtype in STORED and rank <= MAX_RANK


_fitting: dict[Hashable, int] = {}  # index of the first variant not known to be too large, by case


def _on_what_fits(case: Hashable, variants: Sequence[dict[str, int]], launch: Callable[[dict[str, int]], R]) -> R:
    """Launch the first variant for which the GPU has enough shared memory; for the same case, that one from then on."""
    while True:
        index = _fitting.setdefault(case, 0)
        try:
            return launch(variants[index])
        except OutOfResources:
            if index + 1 == len(variants):
                raise
            _fitting[case] += 1


def _rows_of(x: Tensor) -> Tensor:
    """X [..., I] as [N, I] with neighbouring columns side by side."""
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if x_NI.stride(-1) == 1 else x_NI.contiguous()


def _pair_of_rows(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as [N, I] with the same strides."""
    x_NI = _rows_of(x if up is None else x.contiguous())
    return x_NI, None if up is None else _rows_of(up.contiguous())


def _largest_scale(dtype: torch.dtype | None) -> float:
    return kernels.UNLIMITED.value if dtype is None else torch.finfo(dtype).max


def _limits(bits: int) -> dict[str, float]:
    return {"qmin": -(2 ** (bits - 1)), "qmax": 2 ** (bits - 1) - 1, "scale_min": MIN_SCALE}


def _room_for_rows(x: Tensor, size: int, coded: bool) -> tuple[Tensor, Tensor, Tensor]:
    code_dtype = torch.float8_e4m3fn if coded else None
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_room_for_codes(x, x.shape, size, code_dtype)


def _room_for_row_gradients(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, grad_x.new_empty(0) if up is None else torch.empty_like(grad_x)


def _room_for_codes(
    x: Tensor, shape: Sequence[int], size: int, code_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Room for the codes [..., I] and scales [G, N] of a weight or of rows; empty tensors if there is no code dtype.

    float8 codes are held as bytes, because autograd would make gradients of a floating-point output.
    """
    coded = code_dtype is not None
    dtype = torch.int8 if code_dtype == torch.int8 else torch.uint8
    codes = torch.empty(shape if coded else 0, dtype=dtype, device=x.device)
    return codes, x.new_empty((shape[-1] // size, math.prod(shape[:-1])) if coded else 0, dtype=torch.float32)


def _as_float8(codes: Tensor) -> Tensor:
    """Bytes viewed as the float8 codes that they are, and int8 codes as they are.

    An empty tensor stays bytes: on a GPU without float8, a kernel may not even have an argument of that dtype.
    """
    return codes.view(torch.float8_e4m3fn) if codes.numel() and codes.dtype == torch.uint8 else codes


def _row_blocks(size: int) -> dict[str, int]:
    block_g = triton.next_power_of_2(size)
    return {
        "size": size,
        "block_n": max(1, ROW_TILE // block_g),
        "block_g": block_g,
        "num_warps": min(16, max(4, block_g // 1024)),
    }


@torch.library.custom_op("bisup::round_rows", mutates_args=())
def round_rows(
    x: Tensor, up: Tensor | None, clip_G: Tensor, bits: int, size: int, coded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fake_quantize` of [..., I] in groups of `size`, symmetric, with one clip value for all or for each group.

    Args:
        x: What is rounded, [..., I].
        up: If given, [..., I], then silu(x) · up is rounded: the product itself never stands in memory.
        clip_G: Clip values [G] or [1], float32.
        bits: Width of the codes.
        size: Of a group.
        coded: Whether codes and scales are wanted.

    Returns:
        The values; and, if `coded`, their float8 codes [..., I] as bytes and scales [G, N], else two empty tensors.
    """
    x_NI, up_NI = _pair_of_rows(x, up)
    (rows, columns), blocks = x_NI.shape, _row_blocks(size)
    out, codes, scale_GN = _room_for_rows(x, size, coded)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors lie on
        kernels.round_rows[triton.cdiv(rows, blocks["block_n"]), columns // size](
            x_NI, up_NI, clip_G, out, _as_float8(codes), scale_GN, rows, x_NI.stride(0), columns // size,
            int(len(clip_G) > 1), **_limits(bits), **blocks, coded=coded,
        )  # fmt: skip
    return out, codes, scale_GN


@torch.library.custom_op("bisup::round_rows_gradient", mutates_args=())
def round_rows_gradient(
    grad: Tensor, x: Tensor, up: Tensor | None, clip_G: Tensor, bits: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of up (empty where there is none) and of the clip values."""
    x_NI, up_NI = _pair_of_rows(x, up)
    (rows, columns), blocks = x_NI.shape, _row_blocks(size)
    if up is not None:  # a program then holds more for each element
        blocks |= {"block_n": max(1, blocks["block_n"] // 2), "num_warps": 2 * blocks["num_warps"]}
    grad_x, grad_up = _room_for_row_gradients(x, up)
    grad_clip_NG = clip_G.new_empty(rows, columns // size)
    with torch.cuda.device_of(x):
        kernels.round_rows_gradient[triton.cdiv(rows, blocks["block_n"]), columns // size](
            x_NI, up_NI, grad.contiguous(), clip_G, grad_x, grad_up, grad_clip_NG, rows, x_NI.stride(0),
            columns // size, int(len(clip_G) > 1), **_limits(bits), **blocks,
        )  # fmt: skip
    return grad_x, grad_up, grad_clip_NG.sum(0) if len(clip_G) > 1 else grad_clip_NG.sum().reshape(1)


@round_rows.register_fake
def _(x, up, clip_G, bits, size, coded):
    return _room_for_rows(x, size, coded)


@round_rows_gradient.register_fake
def _(grad, x, up, clip_G, bits, size):
    return *_room_for_row_gradients(x, up), torch.empty_like(clip_G)


def _round_rows_backward(ctx, grad, _codes, _scale):
    x, up, clip_G = ctx.saved_tensors
    grad_x, grad_up, grad_clip = round_rows_gradient(grad, x, up, clip_G, *ctx.sizes)
    return grad_x, None if up is None else grad_up, grad_clip, None, None, None


def _keep_rows(ctx, inputs, output):
    *tensors, bits, size, _coded = inputs
    ctx.sizes = bits, size
    ctx.save_for_backward(*tensors)


round_rows.register_autograd(_round_rows_backward, setup_context=_keep_rows)


# Tiles [rows, columns] and warps, as measured on an H100 (benchmarks/quantizers.py).
ROUND_BLOCKS = {"block_o": 64, "num_warps": 4}
PART = 512  # columns of a part of a long group
SEARCH_TILE = 4096  # elements of a weight for which clip values are tried at a time
MAX_SEARCH_BLOCK_I = 512
GRADIENT_BLOCKS = (  # the first whose shared memory the GPU has; in tiles of 64 rows a row's sum stays within a warp
    {"block_o": 64, "num_warps": 4, "num_stages": 2},
    {"block_o": 64, "num_warps": 4, "num_stages": 1},
    {"block_o": 16, "num_warps": 4, "num_stages": 1},
)
MAX_RANK = 128  # of A and B; more does not fit beside a tile
MAX_BLOCK_I = 128


def _weight_arguments(
    w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None, clip: Tensor,
    bits: int, size: int, form: str, scale_dtype: torch.dtype | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments that the kernels of a weight share: the tensors that they read; and sizes and constants, by name."""
    rank, w = 0 if a is None else a.shape[1], _rows_of(w)
    a, b = (None if matrix is None else matrix.contiguous() for matrix in (a, b))
    strides = clip.stride(0) if len(clip) > 1 else 0, int(clip.shape[1] > 1)
    sizes = dict(zip(SIZES, (*w.shape, w.stride(0), w.shape[1] // size, *strides), strict=True))
    return (w, a, b, s, clip), {
        **sizes, **_limits(bits), "rank": rank, "size": size, "form": form, "smoothed": s is not None,
        "stored": STORED[scale_dtype], "scale_max": _largest_scale(scale_dtype),
        "block_i": min(MAX_BLOCK_I, max(16, triton.next_power_of_2(size))),
        "block_r": max(16, triton.next_power_of_2(rank)),
    }  # fmt: skip


def _split(w: Tensor, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a kernel whose program takes a tile of rows of a group, or of a part of a long one; its constants."""
    span = size if size <= MAX_BLOCK_I else PART
    parts = triton.cdiv(size, span)
    grid = triton.cdiv(w.shape[0], ROUND_BLOCKS["block_o"]), w.shape[1] // size * parts
    return grid, {**ROUND_BLOCKS, "parts": parts, "span": span}


@torch.library.custom_op("bisup::round_weight", mutates_args=())
def round_weight(
    w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None, clip: Tensor,
    bits: int, size: int, form: str, scale_dtype: torch.dtype | None,
    dtype: torch.dtype, code_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """⟨(W ⊙ (1 + AB)) · s⟩ [O, C], differentiable in A, B, s and the clip values.

    Args:
        w: W [O, C].
        a: A [O, R], float32, or None; it and B are multiplied in W's dtype, into float32.
        b: B [R, C] likewise.
        s: Factors of the columns [C], float32, or None.
        clip: Clip values [O, G], [1, G] or [1, 1], float32.
        bits: Width of the codes.
        size: Of a group.
        form: `slrec`, `lrec` (W + AB) or `none`.
        scale_dtype: Dtype that the scales are stored in.
        dtype: Of the result.
        code_dtype: Of the codes, int8 or float8 (e4m3, given as bytes); None if they are not wanted.

    Returns:
        The values; the largest magnitude of each group [O, G], float32; its column k within the group [O, G], int32, as
        2k, or as 2k + 1 where the value is negative; and, if a `code_dtype` is given, codes [O, C] and scales [G, O],
        else two empty tensors.
    """
    tensors, constants = _weight_arguments(w, a, b, s, clip, bits, size, form, scale_dtype)
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    absmax = torch.empty(w.shape[0], w.shape[1] // size, dtype=torch.float32, device=w.device)
    signed_argmax = torch.empty_like(absmax, dtype=torch.int32)
    codes, scale_GO = _room_for_codes(w, w.shape, size, code_dtype)
    grid, split = _split(w, size)
    part_absmax = absmax.new_empty(grid[1] if size > MAX_BLOCK_I else 0, w.shape[0])
    part_signed_argmax = torch.empty_like(part_absmax, dtype=torch.int32)
    with torch.cuda.device_of(w):
        if size > MAX_BLOCK_I:  # else the next kernel sees whole groups
            shared = ("rows", "columns", "row_stride", "rank", "size", "form", "smoothed", "block_i", "block_r")
            kernels.absmax_of_parts[grid](
                *tensors[:4], part_absmax, part_signed_argmax, **{name: constants[name] for name in shared}, **split
            )
        kernels.round_weight[grid](
            *tensors, part_absmax, part_signed_argmax, out, absmax, signed_argmax, _as_float8(codes), scale_GO,
            **constants, **split, coded=code_dtype is not None, block_p=triton.next_power_of_2(split["parts"]),
        )  # fmt: skip
    return out, absmax, signed_argmax, codes, scale_GO


@torch.library.custom_op("bisup::round_weight_gradient", mutates_args=())
def round_weight_gradient(
    grad: Tensor, absmax: Tensor, largest: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, s: Tensor | None,
    clip: Tensor, bits: int, size: int, form: str, scale_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of A, B, s and the clip values, float32; empty where there is no such tensor.

    `absmax` and `largest` (the kernels' signed_argmax) are the second and third result of `round_weight`; the other
    arguments are those of `round_weight`.
    """
    tensors, constants = _weight_arguments(w, a, b, s, clip, bits, size, form, scale_dtype)
    (rows, columns), rank, grad = w.shape, constants["rank"], grad.contiguous()
    grad_threshold = torch.empty_like(absmax)
    if size > MAX_BLOCK_I:  # else the next kernel sees whole groups
        grid, split = _split(w, size)
        part_grad_threshold = absmax.new_empty(grid[1], rows)
        with torch.cuda.device_of(w):
            kernels.threshold_gradient[grid](*tensors, grad, absmax, part_grad_threshold, **constants, **split)
        grad_threshold = part_grad_threshold.view(-1, split["parts"], rows).sum(1).T.contiguous()
    tiles = absmax.shape[1] * triton.cdiv(size, constants["block_i"])

    def add_up(blocks: dict[str, int]) -> list[Tensor]:
        steps = triton.cdiv(rows, ROW_PARTS * blocks["block_o"])
        row_parts = triton.cdiv(rows, steps * blocks["block_o"])
        grad_a, grad_b = absmax.new_empty(tiles, rows, rank), absmax.new_empty(row_parts, rank, columns)
        grad_s = absmax.new_empty(row_parts, columns if s is not None else 0)
        with torch.cuda.device_of(w):
            kernels.weight_gradient[row_parts, tiles](
                *tensors, grad, absmax, largest, grad_threshold, grad_a, grad_b, grad_s, **constants, **blocks,
                steps=steps,
            )  # fmt: skip
        return [partial_sums.sum(0) for partial_sums in (grad_a, grad_b, grad_s)]

    grad_a, grad_b, grad_s = _on_what_fits((w.device, w.dtype, rank), GRADIENT_BLOCKS, add_up)
    grad_clip = (grad_threshold * absmax).sum_to_size(clip.shape)
    return grad_a, grad_b, grad_s, grad_clip


@round_weight.register_fake
def _(w, a, b, s, clip, bits, size, form, scale_dtype, dtype, code_dtype):
    shape = w.shape[0], w.shape[1] // size
    return (
        torch.empty(w.shape, dtype=dtype, device=w.device),
        w.new_empty(shape, dtype=torch.float32),
        w.new_empty(shape, dtype=torch.int32),
        *_room_for_codes(w, w.shape, size, code_dtype),
    )


@round_weight_gradient.register_fake
def _(grad, absmax, largest, w, a, b, s, clip, bits, size, form, scale_dtype):
    rank = 0 if a is None else a.shape[1]
    sizes = (w.shape[0], rank), (rank, w.shape[1]), (w.shape[1] if s is not None else 0,), clip.shape
    return tuple(absmax.new_empty(shape) for shape in sizes)


def _round_weight_backward(ctx, grad, *_others):
    w, a, b, s, clip, absmax, signed_argmax = ctx.saved_tensors
    bits, size, form, scale_dtype = ctx.options
    grad_a, grad_b, grad_s, grad_clip = round_weight_gradient(
        grad, absmax, signed_argmax, w, a, b, s, clip, bits, size, form, scale_dtype
    )
    return (
        None,  # w
        None if a is None else grad_a,
        None if b is None else grad_b,
        None if s is None else grad_s,
        grad_clip,
        *(None,) * 6,  # bits, size, form, scale_dtype, dtype, code_dtype
    )


def _keep_weight(ctx, inputs, output):
    w, a, b, s, clip, bits, size, form, scale_dtype, _dtype, _code_dtype = inputs
    _out, absmax, signed_argmax, _codes, _scale_GO = output
    ctx.options = bits, size, form, scale_dtype
    ctx.save_for_backward(w, a, b, s, clip, absmax, signed_argmax)


round_weight.register_autograd(_round_weight_backward, setup_context=_keep_weight)


def clip_errors(w: Tensor, clip_K: Tensor, bits: int, size: int, scale_dtype: torch.dtype | None) -> Tensor:
    """Squared error [K, O, G] of rounding each group of W [O, I] with each of the clip values [K], float32.

    Args:
        w: W.
        clip_K: Clip values, float32.
        bits: Width of the codes.
        size: Of a group.
        scale_dtype: Dtype that the scales are stored in.
    """
    (rows, columns), w = w.shape, _rows_of(w)
    error_KOG = clip_K.new_empty(len(clip_K), rows, columns // size)
    block_i = min(MAX_SEARCH_BLOCK_I, triton.next_power_of_2(size))
    block_o = SEARCH_TILE // block_i
    with torch.cuda.device_of(w):
        kernels.clip_errors[triton.cdiv(rows, block_o), columns // size](
            w, clip_K, error_KOG, rows, w.stride(0), columns // size, candidates=len(clip_K), size=size,
            stored=STORED[scale_dtype], scale_max=_largest_scale(scale_dtype), block_o=block_o, block_i=block_i,
            **_limits(bits),
        )  # fmt: skip
    return error_KOG


@torch.library.custom_op("bisup::multiply_codes", mutates_args=())
def multiply_codes(
    x: Tensor, w_OI: Tensor, x_codes: Tensor, w_codes: Tensor, x_scale_GN: Tensor, w_scale_GO: Tensor
) -> Tensor:
    """⟨x⟩ Ŵᵀ [..., O] by the codes, which float8 tensor cores multiply exactly; scales come to the sums over groups.

    Gradients are those of the product of the values x and Ŵ, which is not computed.
    """
    x8_NI, w8_OI = _as_float8(x_codes).flatten(0, -2), _as_float8(w_codes)
    out_NO = torch._scaled_mm(x8_NI, w8_OI.T, x_scale_GN.T, w_scale_GO, out_dtype=x.dtype)
    return out_NO.view(*x.shape[:-1], -1)


@multiply_codes.register_fake
def _(x, w_OI, x_codes, w_codes, x_scale_GN, w_scale_GO):
    return x.new_empty(*x.shape[:-1], w_OI.shape[0])


def _multiply_backward(ctx, grad):
    x, w_OI = ctx.saved_tensors
    return grad @ w_OI, grad.flatten(0, -2).T @ x.flatten(0, -2), *(None,) * 4


def _keep_factors(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


multiply_codes.register_autograd(_multiply_backward, setup_context=_keep_factors)
