"""Slow, obvious float64 versions of every formula, which the package is compared with.

Nothing here is imported from the package: a mistake would have to be made twice to stay hidden. Tensors come in and go
out as float64; the work in between is loops over plain numbers, except where autograd has to see it, and there it is a
plain composition of torch's own operations on one group at a time.

Contents: number formats · quantize, dequantize (eq. 1-3) · straight-through fake_quantize · clip search · bit packing ·
low rank (eq. 6, 7).
"""

import itertools
import math

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24


def rows_of(x: Tensor) -> list[tuple[int, ...]]:
    """Every index of the leading dimensions: x[index] is one row."""
    return list(itertools.product(*(range(length) for length in x.shape[:-1])))


def group_slices(features: int, group_size: int | None) -> list[slice]:
    """Where the groups lie in a row."""
    size = features if group_size is None else group_size
    assert features % size == 0
    return [slice(begin, begin + size) for begin in range(0, features, size)]


# --- number formats ---------------------------------------------------------------------------------------------------

SIGNIFICANT_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}
LAST_PLACE = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}  # exponent of the smallest subnormal


def round_to_format(value: float, dtype: torch.dtype | None) -> float:
    """The nearest number that the format holds, ties to even; below the format's overflow."""
    if dtype is None or value == 0:
        return value
    _, exponent = math.frexp(value)  # 2^(exponent-1) <= |value| < 2^exponent
    step = 2.0 ** max(exponent - SIGNIFICANT_BITS[dtype], LAST_PLACE[dtype])
    return round(value / step) * step


# --- quantize and dequantize (eq. 1-3) --------------------------------------------------------------------------------


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def clips_per_group(x: Tensor, group_size: int | None, clip: Tensor | None) -> Tensor:
    """A clip value for each group of each row, [..., G]; views of `clip`, so gradients flow."""
    shape = (*x.shape[:-1], len(group_slices(x.shape[-1], group_size)))
    return torch.ones(shape, dtype=torch.float64) if clip is None else torch.broadcast_to(clip.double(), shape)


def quantize_numbers(
    numbers: list[float], bits: int, symmetric: bool, clip: float = 1.0, scale_dtype: torch.dtype | None = None
) -> tuple[list[int], float, float]:
    """Codes, scale and offset (0 if symmetric) of one group."""
    smallest_code, largest_code = code_range(bits, symmetric)
    if symmetric:
        offset = 0.0
        reach = max(abs(number) for number in numbers)
    else:
        offset = min(numbers)
        reach = max(numbers) - min(numbers)
    scale = max(round_to_format(reach / largest_code * clip, scale_dtype), SMALLEST_SCALE)
    codes = [min(max(round((number - offset) / scale), smallest_code), largest_code) for number in numbers]
    return codes, scale, offset


def quantize(
    x: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
    clip: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., I], scale [..., G] and offset [..., G] (zeros if symmetric) of x [..., I]."""
    clips = clips_per_group(x, group_size, clip)
    codes = torch.empty(x.shape, dtype=torch.float64)
    scale, offset = torch.empty(clips.shape, dtype=torch.float64), torch.empty(clips.shape, dtype=torch.float64)
    for row in rows_of(x):
        for g, group in enumerate(group_slices(x.shape[-1], group_size)):
            numbers = x[row][group].double().tolist()
            integers, delta, low = quantize_numbers(numbers, bits, symmetric, clips[row][g].item(), scale_dtype)
            codes[row][group] = torch.tensor(integers, dtype=torch.float64)
            scale[row][g], offset[row][g] = delta, low
    return codes, scale, offset


def quantize_symmetric(
    x: Tensor,
    bits: int,
    group_size: int | None = None,
    clip: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 1-3: Δ = max|x| / (2^(N-1) - 1) · c, q = clamp(round(x/Δ)). Codes and scale."""
    return quantize(x, bits, True, group_size, clip, scale_dtype)[:2]


def quantize_asymmetric(
    x: Tensor,
    bits: int,
    group_size: int | None = None,
    clip: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 … 2^N - 1 above the minimum, which stays a float. Codes, scale and offset."""
    return quantize(x, bits, False, group_size, clip, scale_dtype)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Values [..., I] from codes [..., I] and scale (and offset) [..., G]."""
    x = torch.empty(codes.shape, dtype=torch.float64)
    size = codes.shape[-1] // scale.shape[-1]
    for row in rows_of(codes):
        for i in range(codes.shape[-1]):
            low = 0.0 if offset is None else offset[row][i // size].item()
            x[row][i] = int(codes[row][i].item()) * scale[row][i // size].item() + low
    return x


# --- straight-through fake_quantize -----------------------------------------------------------------------------------


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value with the gradient of the exact one."""
    return exact + (rounded - exact).detach()


def fake_quantize(
    x: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
    clip: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize and dequantize x [..., I]; autograd's own composition gives the gradients of x and clip."""
    x, clips = x.double(), clips_per_group(x, group_size, clip)
    smallest_code, largest_code = code_range(bits, symmetric)
    parts = []
    for row in rows_of(x):
        for g, group in enumerate(group_slices(x.shape[-1], group_size)):
            values = x[row][group]
            offset = torch.zeros((), dtype=torch.float64) if symmetric else values.amin()
            reach = values.abs().amax() if symmetric else values.amax() - offset
            scale = reach / largest_code * clips[row][g]
            stored = round_to_format(scale.item(), scale_dtype)
            scale = straight_through(scale, torch.tensor(stored, dtype=torch.float64)).clamp_min(SMALLEST_SCALE)
            t = (values - offset) / scale
            codes = straight_through(t, t.round()).clamp(smallest_code, largest_code)
            parts.append(codes * scale + offset)
    return torch.cat(parts).reshape(x.shape)


def frozen_fake_quantize(
    x: Tensor,
    clip: Tensor,
    at: tuple[Tensor, Tensor],
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
) -> Tensor:
    """What fake_quantize becomes when every rounding decision is frozen where it stood at the point `at` = (x, clip).

    An element inside the range is x + rΔ, with its rounding error r in steps held constant; a clamped one is its edge
    times Δ. This is smooth (but for ties of the maximum), and its ordinary derivative at that point, which finite
    differences can measure, is what the straight-through estimator claims to be.
    """
    at_x, at_clip = at
    clips, at_clips = clips_per_group(x, group_size, clip), clips_per_group(x, group_size, at_clip)
    smallest_code, largest_code = code_range(bits, symmetric)
    y = torch.empty(x.shape, dtype=torch.float64)
    for row in rows_of(x):
        for g, group in enumerate(group_slices(x.shape[-1], group_size)):
            numbers, at_numbers = x[row][group].tolist(), at_x[row][group].tolist()
            _, scale, offset = quantize_numbers(numbers, bits, symmetric, clips[row][g].item())
            _, at_scale, at_offset = quantize_numbers(at_numbers, bits, symmetric, at_clips[row][g].item())
            values = []
            for number, at_number in zip(numbers, at_numbers, strict=True):
                t = (at_number - at_offset) / at_scale
                if smallest_code <= round(t) <= largest_code:
                    values.append(number + (round(t) - t) * scale)
                else:
                    edge = smallest_code if t < 0 else largest_code
                    values.append(edge * scale + offset)
            y[row][group] = torch.tensor(values, dtype=torch.float64)
    return y


# --- clip search ------------------------------------------------------------------------------------------------------


def squared_errors(
    w: Tensor,
    clip: float,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """Squared rounding error of each group of each row, [O, G], all clipped alike."""
    groups = group_slices(w.shape[-1], group_size)
    errors = torch.zeros(w.shape[0], len(groups), dtype=torch.float64)
    for o in range(w.shape[0]):
        for g, group in enumerate(groups):
            numbers = w[o][group].double().tolist()
            codes, scale, offset = quantize_numbers(numbers, bits, symmetric, clip, scale_dtype)
            errors[o, g] = sum(
                (code * scale + offset - number) ** 2 for code, number in zip(codes, numbers, strict=True)
            )
    return errors


def search_clip(
    w: Tensor,
    grid: list[float],
    granularity: str,
    bits: int,
    symmetric: bool,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """The clip of least squared error for each row and group [O, G], each group [1, G] or the tensor [1, 1].

    Every clip of the grid is tried for everything; the first of equals wins.
    """
    errors = [squared_errors(w, clip, bits, symmetric, group_size, scale_dtype) for clip in grid]
    rows, groups = range(errors[0].shape[0]), range(errors[0].shape[1])
    sharers = {
        "row": [[[(o, g)] for g in groups] for o in rows],
        "group": [[[(o, g) for o in rows] for g in groups]],
        "tensor": [[[(o, g) for o in rows for g in groups]]],
    }[granularity]
    best = [
        [min(range(len(grid)), key=lambda k: sum(errors[k][place].item() for place in places)) for places in line]
        for line in sharers
    ]
    return torch.tensor([[grid[k] for k in line] for line in best], dtype=torch.float64)


# --- bit packing ------------------------------------------------------------------------------------------------------


def pack(codes: list[int], bits: int, smallest_code: int) -> list[list[int]]:
    """Bytes of one row, [bits][ceil(len/8)]: plane j is made of the codes' j-th binary digits, first code lowest."""
    digits = [format(code - smallest_code, f"0{bits}b") for code in codes]  # most significant digit first
    assert all(len(number) == bits for number in digits)
    digits += ["0" * bits] * (-len(codes) % 8)
    planes = []
    for j in range(bits):
        plane = "".join(number[bits - 1 - j] for number in digits)
        planes.append([int(plane[begin : begin + 8][::-1], 2) for begin in range(0, len(plane), 8)])
    return planes


def unpack(planes: list[list[int]], length: int, smallest_code: int) -> list[int]:
    """The codes of one row from its bytes."""
    codes = []
    for i in range(length):
        code = 0
        for j, plane in enumerate(planes):
            code += (plane[i // 8] // 2 ** (i % 8) % 2) * 2**j
        codes.append(code + smallest_code)
    return codes


# --- low rank (eq. 6, 7) ----------------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor) -> Tensor:
    """AB [O, I] of A [O, r] and B [r, I], number by number; autograd sees it."""
    rows = [
        torch.stack([sum(a[o, r] * b[r, i] for r in range(a.shape[1])) for i in range(b.shape[1])])
        for o in range(a.shape[0])
    ]
    return torch.stack(rows)


def slrec(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Eq. 7: W ⊙ (1 + AB)."""
    return w + w * product(a, b)


def lrec(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Eq. 6: W + AB."""
    return w + product(a, b)
