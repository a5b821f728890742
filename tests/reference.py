"""Slow, obvious float64 versions of every formula, which the package is compared with.

Nothing here is imported from the package: a mistake would have to be made twice to stay hidden. Tensors come in and go
out as float64; the work in between is loops over plain numbers, except where autograd has to see it, and there it is a
plain composition of torch's own operations on one group at a time.

Contents: number formats · quantize, dequantize (eq. 1-3) · straight-through fake_quantize · clip search · bit packing ·
low rank (eq. 6, 7) · a decoder block with Θ (eq. 3, 5-8).
"""

import itertools
import math
from dataclasses import dataclass

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


# --- a decoder block with Θ (eq. 3, 5-8; §4.5) ------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the tensors of a decoder block do not tell: heads, their size, the norms' ε and the base of RoPE."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    rope_base: float = 10000.0


@dataclass(frozen=True)
class Quantizers:
    """Widths of a quantized block, what shares a scale of its keys and values, and the form of Θ2 and Θ3."""

    weights: int
    activations: int | None
    kv: int | None
    group_size: int | None = None
    kv_granularity: str = "head"
    hard: bool = False
    low_rank: str = "slrec"


NORM_BEFORE = {f"self_attn.{part}_proj": "input_layernorm" for part in "qkv"} | {
    f"mlp.{part}_proj": "post_attention_layernorm" for part in ("gate", "up")
}


class DecoderBlock:
    """A Llama-like decoder block in float64: full-precision with `quantizers` None, else with Θ.

    Tensors are named as in a checkpoint; Θ by what it belongs to: `<norm>.smoothing` s1, `<linear>.smoothing` s2,
    `<linear>.low_rank_a`, `<linear>.low_rank_b`, `<linear>.clip` [O, G], and `<input>.input_clip` [G], where an input
    is named after the norm that makes it or the linear that reads it.

    After a call, `tie_distance` is how near any rounding or gradient came to being undecided, in steps.
    """

    def __init__(self, tensors, shape, quantizers=None, theta=None):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.shape, self.quantizers, self.theta = shape, quantizers, theta or {}
        self.tie_distance = math.inf

    def __call__(self, x: Tensor, prompt: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Hidden states [B, T, D] behind the block; the prompt's keys and values [H, P, d] stand in front."""
        return torch.stack([self.sequence(x_TD, prompt) for x_TD in x.double()])

    def sequence(self, x: Tensor, prompt: tuple[Tensor, Tensor] | None) -> Tensor:
        """One sequence [T, D]."""
        normed = self.norm("input_layernorm", x)
        q, k, v = (self.linear(f"self_attn.{part}_proj", normed) for part in "qkv")
        x = x + self.linear("self_attn.o_proj", self.input("self_attn.o_proj", self.attention(q, k, v, prompt)))
        normed = self.norm("post_attention_layernorm", x)
        gate, up = self.linear("mlp.gate_proj", normed), self.linear("mlp.up_proj", normed)
        return x + self.linear("mlp.down_proj", self.input("mlp.down_proj", gate / (1 + torch.exp(-gate)) * up))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, prompt: tuple[Tensor, Tensor] | None) -> Tensor:
        """Causal attention of q [T, heads·d] over the prompt and k, v [T, kv_heads·d], one head and query at a time."""
        shape, start = self.shape, 0 if prompt is None else prompt[0].shape[1]
        q, k, v = (part.unflatten(-1, (-1, shape.head_dim)) for part in (q, k, v))
        if "self_attn.q_norm.weight" in self.tensors:
            q = rms_norm(q, self.tensors["self_attn.q_norm.weight"], shape.eps)
            k = rms_norm(k, self.tensors["self_attn.k_norm.weight"], shape.eps)
        q, k = (torch.stack([rope(x_hd, start + t, shape.rope_base) for t, x_hd in enumerate(part)]) for part in (q, k))
        k, v = self.keys_or_values(k), self.keys_or_values(v)
        if prompt is not None:  # high precision, never quantized
            k, v = (
                torch.cat([front.double().transpose(0, 1), part]) for front, part in zip(prompt, (k, v), strict=True)
            )
        rows = []
        for t in range(len(q)):
            heads = []
            for h in range(shape.heads):
                shared = h * shape.kv_heads // shape.heads
                seen = slice(0, start + t + 1)
                scores = torch.exp(k[seen, shared] @ q[t, h] / math.sqrt(shape.head_dim))
                heads.append((scores / scores.sum()) @ v[seen, shared])
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    def keys_or_values(self, x: Tensor) -> Tensor:
        """⟨k⟩ or ⟨v⟩ of [T, H, d]: asymmetric, a scale for each head of a token, or for each token."""
        if self.quantizers is None or self.quantizers.kv is None:
            return x
        if self.quantizers.kv_granularity == "head":
            return self.fake_quantize(x, self.quantizers.kv, symmetric=False)
        return self.fake_quantize(x.flatten(1), self.quantizers.kv, symmetric=False).unflatten(-1, x.shape[1:])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """⟨norm(x) · s1⟩ (eq. 5): s1 multiplies the norm's weight."""
        weight = self.tensors[f"{name}.weight"] * self.theta.get(f"{name}.smoothing", 1.0)
        return self.input(name, rms_norm(x, weight, self.shape.eps))

    def input(self, name: str, x: Tensor) -> Tensor:
        """⟨x⟩ under the input's clip values (eq. 3)."""
        if self.quantizers is None or self.quantizers.activations is None:
            return x
        clip = self.theta.get(f"{name}.input_clip")
        return self.fake_quantize(x, self.quantizers.activations, True, self.quantizers.group_size, clip)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x Ŵᵀ + bias with Ŵ = ⟨(W ⊙ (1 + AB)) · s2⟩ (eq. 3, 5, 7), or W + AB for W ⊙ (1 + AB) (eq. 6)."""
        weight = self.tensors[f"{name}.weight"]
        if self.quantizers is not None:
            if f"{name}.low_rank_a" in self.theta:
                form = {"slrec": slrec, "lrec": lrec}[self.quantizers.low_rank]
                weight = form(weight, self.theta[f"{name}.low_rank_a"], self.theta[f"{name}.low_rank_b"])
            weight = weight * self.column_smoothing(name)
            clip = self.theta.get(f"{name}.clip")
            weight = self.fake_quantize(weight, self.quantizers.weights, True, self.quantizers.group_size, clip)
        return x @ weight.T + self.tensors.get(f"{name}.bias", 0.0)

    def column_smoothing(self, name: str) -> Tensor | float:
        """s2 [I] of a linear: its own, or 1/s1 where s1 and s2 are tied."""
        if self.quantizers.hard and name in NORM_BEFORE and f"{NORM_BEFORE[name]}.smoothing" in self.theta:
            return 1 / self.theta[f"{NORM_BEFORE[name]}.smoothing"]
        return self.theta.get(f"{name}.smoothing", 1.0)

    def fake_quantize(self, x, bits, symmetric, group_size=None, clip=None):
        """`fake_quantize`, watching for ties."""
        distance = tie_distance(x.detach(), bits, symmetric, group_size, None if clip is None else clip.detach())
        self.tie_distance = min(self.tie_distance, distance)
        return fake_quantize(x, bits, symmetric, group_size, clip)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, position: int, base: float) -> Tensor:
    """RoPE of [..., d] at a position: element i turns with element i + d/2 by position · base^(-2i/d)."""
    half = x.shape[-1] // 2
    first, second = [], []
    for i in range(half):
        angle = position * base ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        first.append(a * math.cos(angle) - b * math.sin(angle))
        second.append(b * math.cos(angle) + a * math.sin(angle))
    return torch.stack(first + second, -1)


def tie_distance(x, bits, symmetric, group_size=None, clip=None) -> float:
    """How far x [..., I] is from where its rounding or a gradient is undecided, in steps.

    An element is undecided halfway between two codes; a gradient is where two elements share the extreme that sets Δ.
    """
    clips, least = clips_per_group(x, group_size, clip), math.inf
    for row in rows_of(x):
        for g, group in enumerate(group_slices(x.shape[-1], group_size)):
            numbers = x[row][group].tolist()
            _, scale, offset = quantize_numbers(numbers, bits, symmetric, clips[row][g].item())
            least = min(least, *(abs((number - offset) / scale % 1 - 0.5) for number in numbers))
            ordered = sorted(abs(number) for number in numbers) if symmetric else sorted(numbers)
            least = min(least, (ordered[-1] - ordered[-2]) / scale)
            if not symmetric:
                least = min(least, (ordered[1] - ordered[0]) / scale)
    return least


def block_loss(quantized: DecoderBlock, x_q: Tensor, full: DecoderBlock, x_fp: Tensor, prompt=None) -> Tensor:
    """Eq. 8: mean square of the quantized block on x_q against the full-precision block on x_fp."""
    return (quantized(x_q, prompt) - full(x_fp, prompt)).square().mean()
