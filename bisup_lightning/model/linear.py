"""Linears and norms that quantize. A QuantLinear learns; fused, it becomes a PackedLinear that only computes.

Shape suffixes: B sequences, T tokens, O output rows, I input features, G groups, R rank, C columns of a segment.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bisup_lightning.quant import integer_product, low_rank, operators
from bisup_lightning.quant.affine import (
    as_stored,
    dequantize,
    fake_quantize,
    fake_quantize_segments,
    quantize,
    side_by_side,
    wide,
)
from bisup_lightning.quant.clipping import search_weight_clip
from bisup_lightning.quant.gated import Gated
from bisup_lightning.quant.hadamard import apply_hadamard, hadamard_factors
from bisup_lightning.quant.integer_product import Coded
from bisup_lightning.quant.packing import fast_unpack, pack, unpack
from bisup_lightning.quant.spec import QuantSpec, Segment

LowRankForm = Literal["slrec", "lrec"]
EVERY = slice(None)
LOW_RANK = {"slrec": low_rank.slrec, "lrec": low_rank.lrec}


class InputQuantizer(nn.Module):
    """Arranges and quantizes the activation that one or several linears read, once for all of them.

    Args:
        segments: How its last dimension I is split, with the quantizers; granularity `tensor` gives one clip value
            (WAC), any other one for each group (FWAC).
        clip: Start of the clip values (paper §4.1; 0.9 for activations).
        storage_dtype: Dtype that the clip values are stored in.
        rotated: Size n of the online Hadamard transform (QuaRot): I for all of it, fewer to mix n heads; 0 for none.
        reordered: Whether channels are permuted first (Atom); `order` [I] then holds the permutation.
    """

    order: Tensor | None

    def __init__(
        self,
        segments: Sequence[Segment],
        clip: float,
        storage_dtype: torch.dtype | None,
        rotated: int = 0,
        reordered: bool = False,
    ) -> None:
        super().__init__()
        self.segments, self.storage_dtype, self.rotated = tuple(segments), storage_dtype, rotated
        features = sum(segment.columns for segment in segments)
        self.clips = nn.ParameterList(torch.full((_clip_count(segment),), clip) for segment in segments)
        self.with_codes = False  # whether passes with gradients give integer codes, too, for integer products
        self.register_buffer("order", torch.arange(features, dtype=torch.int32) if reordered else None)
        self._factors: tuple[Tensor, ...] = hadamard_factors(rotated, torch.float32) if rotated else ()

    def arrange(self, x: Tensor) -> Tensor:
        """Reorder (Atom) and rotate (QuaRot) the channels of x [..., I] as they are quantized.

        Applied to the columns of a weight as well, this leaves x·Wᵀ unchanged.
        """
        if self.order is not None:
            x = x[..., self.order]
        if self.rotated:
            if any(factor.device != x.device for factor in self._factors):
                self._factors = tuple(factor.to(x.device) for factor in self._factors)
            heads = x.unflatten(-1, (self.rotated, -1))
            x = apply_hadamard(heads, self._factors, dim=-2).flatten(-2)
        return x

    def forward(self, x_BTI: Tensor | Gated) -> Tensor | Coded:
        """⟨x⟩ in x's dtype."""
        clips = [as_stored(clip, self.storage_dtype) for clip in self.clips]
        with_codes = self.with_codes and torch.is_grad_enabled()
        if isinstance(x_BTI, Gated):  # which has no other order; where it is rotated, the product comes instead
            if with_codes:
                return integer_product.coded_rows(x_BTI.gate, self.segments[0], clips[0], x_BTI.up)
            x_BTI = x_BTI.product()
        x_BTI = self.arrange(x_BTI)
        if with_codes:
            return integer_product.coded_rows(x_BTI, self.segments[0], clips[0])
        return fake_quantize_segments(x_BTI, self.segments, clips)

    def extra_repr(self) -> str:
        """The quantizers in `print(model)`."""
        return f"{self.segments}, rotated={self.rotated}, reordered={self.order is not None}"


def _clip_count(segment: Segment) -> int:
    if segment.spec is None or segment.spec.granularity == "tensor":
        return 1
    return segment.spec.groups(segment.columns)


class QuantNorm(nn.Module):
    """A norm whose output is quantized for the linears it feeds; s1 smooths between the two (paper §4.2).

    Args:
        norm: The block's own norm, with its weight [I].
        quantizer: Quantizer of the norm's output.
        storage_dtype: Dtype that the norm's weight is stored in.
    """

    smoothing: nn.Parameter | None

    def __init__(self, norm: nn.Module, quantizer: InputQuantizer, storage_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm, self.quantizer, self.storage_dtype = norm, quantizer, storage_dtype
        self.register_parameter("smoothing", None)

    def smoothed_weight(self) -> Tensor:
        """The norm's weight times s1, as it will be stored."""
        weight_I = self.norm.weight
        assert isinstance(weight_I, Tensor)
        assert self.smoothing is not None
        return as_stored(weight_I * self.smoothing, self.storage_dtype).to(weight_I.dtype)

    def forward(self, x_BTI: Tensor) -> Tensor | Coded:
        """⟨norm(x) · s1⟩ in x's dtype."""
        if self.smoothing is None:
            return self.quantizer(self.norm(x_BTI))
        return self.quantizer(functional_call(self.norm, {"weight": self.smoothed_weight()}, (x_BTI,)))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold s1 into the norm's weight; the block's output stays the same."""
        if self.smoothing is not None:
            self.norm.weight = nn.Parameter(self.smoothed_weight(), requires_grad=False)
            self.smoothing = None


class QuantLinear(nn.Module):
    """A linear that computes with Ŵ = ⟨(W ⊙ (1 + AB)) · s2⟩ and learns its clip values, s2, A and B.

    W and the bias are not part of the state dict: that is Θ alone.

    Args:
        weight: W [O, I], arranged as the input is when it is quantized.
        bias: [O] or None.
        segments: How W's columns are split, with the quantizers; clip values start at a grid search.
        input_quantizer: Quantizer of this linear's own input; an identity where a QuantNorm already quantized it.
        storage_dtype: Dtype that the scales are stored in.
    """

    weight: Tensor
    bias: Tensor | None
    smoothing: nn.Parameter | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        segments: Sequence[Segment],
        input_quantizer: nn.Module,
        storage_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.segments, self.storage_dtype = tuple(segments), storage_dtype
        self.input_quantizer = input_quantizer
        parts = self.weight.split([segment.columns for segment in segments], -1)
        self.clips = nn.ParameterList(
            torch.ones(1, 1, device=weight.device)
            if segment.spec is None
            else search_weight_clip(part, segment.spec, storage_dtype)
            for part, segment in zip(parts, segments, strict=True)
        )
        self.smoothing_is_inverse = False
        self.smoothing_order: Tensor | None = None
        self.low_rank_form: LowRankForm = "slrec"
        self.frugal = False  # whether Ŵ (on a CPU also its float32 steps) is recomputed for gradients, not kept
        for name in ("smoothing", "low_rank_a", "low_rank_b"):
            self.register_parameter(name, None)

    def add_smoothing(self, smoothing: nn.Parameter) -> None:
        """Give this linear its own s2 [I] (SWAS)."""
        self.smoothing = smoothing

    def tie_smoothing(self, smoothing: nn.Parameter, order: Tensor | None) -> None:
        """Divide by the norm's s1 [I], reordered as this linear's columns are (WAS)."""
        self.smoothing, self.smoothing_is_inverse, self.smoothing_order = smoothing, True, order

    def add_low_rank(self, form: LowRankForm, a_OR: Tensor, b_RI: Tensor) -> None:
        """Give this linear its low-rank compensation."""
        self.low_rank_form = form
        self.low_rank_a, self.low_rank_b = nn.Parameter(a_OR), nn.Parameter(b_RI)

    def compensated_weight(self, columns: slice = EVERY) -> Tensor:
        """(W ⊙ (1 + AB)) · s2 [O, I] before quantization, or some columns of it, in the wide dtype."""
        w_OC, factors_I = self.weight[:, columns], self.column_factors()
        if self.low_rank_a is not None and self.low_rank_b is not None:
            w_OC = LOW_RANK[self.low_rank_form](w_OC, self.low_rank_a, self.low_rank_b[:, columns])
        return wide(w_OC if factors_I is None else w_OC * factors_I[columns])

    def column_factors(self) -> Tensor | None:
        """s2 [I] (WAS: 1/s1), if there is any."""
        if self.smoothing is None:
            return None
        s_I = self.smoothing if self.smoothing_order is None else self.smoothing[self.smoothing_order]
        return 1 / s_I if self.smoothing_is_inverse else s_I

    def quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Ŵ [O, I] in a dtype."""
        parts = []
        for segment, columns, clip in self._segments():
            if segment.spec is None:
                part_OC = as_stored(self.compensated_weight(columns), self.storage_dtype)
            elif self._by_kernels():
                part_OC = self._rounded_by_kernel(segment.spec, columns, clip, dtype)[0]
            else:
                part_OC = fake_quantize(self.compensated_weight(columns), segment.spec, clip, self.storage_dtype)
            parts.append(part_OC.to(dtype))
        return side_by_side(parts)

    def _segments(self) -> Iterator[tuple[Segment, slice, Tensor]]:
        """Each segment with its columns and clip values."""
        end = 0
        for segment, clip in zip(self.segments, self.clips, strict=True):
            yield segment, slice(end, end := end + segment.columns), clip

    def _by_kernels(self) -> bool:
        rank = 0 if self.low_rank_a is None else self.low_rank_a.shape[1]
        return operators.supports(self.weight, rank)

    def _rounded_by_kernel(
        self,
        spec: QuantSpec,
        columns: slice,
        clip: Tensor,
        dtype: torch.dtype,
        code_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """What `round_weight` gives for some columns of Ŵ, keeping nothing of W's size for the gradients."""
        factors_I = self.column_factors()
        b_RC = None if self.low_rank_b is None else self.low_rank_b[:, columns]
        return operators.round_weight(
            self.weight[:, columns], self.low_rank_a, b_RC, None if factors_I is None else factors_I[columns], clip,
            spec.bits, spec.group_size or columns.stop - columns.start, "none" if b_RC is None else self.low_rank_form,
            self.storage_dtype, dtype, code_dtype,
        )  # fmt: skip

    def coded_weight(self) -> Coded:
        """Ŵ [O, I] with its codes; for a weight of one segment."""
        ((segment, columns, clip),) = self._segments()
        assert segment.spec is not None
        values, *_, codes, scale_GO = self._rounded_by_kernel(
            segment.spec, columns, clip, self.weight.dtype, torch.float8_e4m3fn
        )
        return Coded(values, codes, scale_GO)

    def forward(self, x_BTI: Tensor | Coded) -> Tensor:
        """⟨x⟩ Ŵᵀ + bias, in x's dtype."""
        x_BTI = self.input_quantizer(x_BTI)
        if isinstance(x_BTI, Coded):
            return integer_product.linear(x_BTI, self.coded_weight(), self.bias)
        if self.frugal:
            w_OI = checkpoint(self.quantized_weight, x_BTI.dtype, use_reentrant=False, preserve_rng_state=False)
        else:
            w_OI = self.quantized_weight(x_BTI.dtype)
        return F.linear(x_BTI, w_OI, self.bias)

    def unquantized(self) -> "PackedLinear":
        """The same linear with its weight as it is; only its input is quantized."""
        whole = PackedSegment.of_values(self.weight, self.weight.dtype)
        return PackedLinear([whole], self.bias, self.input_quantizer)

    @torch.no_grad()
    def fuse(self) -> "PackedLinear":
        """The linear with Θ folded in and the weight as integer codes; it computes the same output."""
        packed = [self._packed(*part) for part in self._segments()]
        return PackedLinear(packed, self.bias, self.input_quantizer)

    def _packed(self, segment: Segment, columns: slice, clip: Tensor) -> "PackedSegment":
        """Some columns with the codes of `quantized_weight`."""
        if segment.spec is None:
            return PackedSegment.of_values(self.compensated_weight(columns), self.storage_dtype)
        if not self._by_kernels():
            codes_OC, scale_OG, _ = quantize(self.compensated_weight(columns), segment.spec, clip, self.storage_dtype)
            return PackedSegment.of_codes(codes_OC, scale_OG, segment.spec)
        values_OC, *_, codes_OC, scale_GO = self._rounded_by_kernel(
            segment.spec, columns, clip, self.weight.dtype, torch.int8
        )
        return PackedSegment.of_codes(codes_OC, scale_GO.T.contiguous(), segment.spec, values_OC)


class PackedSegment(nn.Module):
    """Neighbouring columns of a weight [O, C]: packed codes and scales, or values where they are not quantized.

    Args:
        rows: O.
        segment: Number of columns C and their quantizer (symmetric), or None.
    """

    codes: Tensor  # codes and scale where there is a quantizer, else values; the rest is None
    scale: Tensor
    values: Tensor
    dense_OC: Tensor | None  # the dequantized columns in W's dtype, from `of_codes` until `take_dense`

    def __init__(self, rows: int, segment: Segment) -> None:
        super().__init__()
        self.columns, self.spec = segment.columns, segment.spec
        self.register_buffer("dense_OC", None, persistent=False)
        for name in ("codes", "scale", "values"):
            self.register_buffer(name, None)
        if segment.spec is None:
            self.values = torch.empty(rows, segment.columns)
        else:
            self.codes = torch.empty(rows, segment.spec.bits, -(-segment.columns // 8), dtype=torch.uint8)
            self.scale = torch.empty(rows, segment.spec.groups(segment.columns))

    @classmethod
    def of_codes(
        cls, codes_OC: Tensor, scale_OG: Tensor, spec: QuantSpec, dense_OC: Tensor | None = None
    ) -> "PackedSegment":
        """Pack codes [O, C] with their scales [O, G].

        Args:
            codes_OC: Integer codes.
            scale_OG: Scales in their storage dtype.
            spec: The quantizer.
            dense_OC: The dequantized columns, if the caller has them; `take_dense` hands them out once.
        """
        with torch.device("meta"):
            packed = cls(codes_OC.shape[0], Segment(codes_OC.shape[1], spec))
        packed.codes, packed.scale = pack(codes_OC, spec.bits, spec.qmin), scale_OG
        packed.dense_OC = dense_OC
        return packed

    @classmethod
    def of_values(cls, w_OC: Tensor, storage_dtype: torch.dtype) -> "PackedSegment":
        """Keep values, as they will be stored."""
        with torch.device("meta"):
            packed = cls(w_OC.shape[0], Segment(w_OC.shape[1], None))
        packed.values = as_stored(w_OC, storage_dtype)
        return packed

    def dense(self, restore: Callable[[Tensor, int, int], Tensor] = unpack) -> Tensor:
        """The columns [O, C] in the wide dtype."""
        if self.spec is None:
            return wide(self.values)
        return dequantize(restore(self.codes, self.columns, self.spec.qmin), self.scale)

    def take_dense(self, dtype: torch.dtype) -> Tensor:
        """The columns [O, C] in a dtype: those given to `of_codes` if they have it, else unpacked; keeps neither."""
        dense_OC, self.dense_OC = self.dense_OC, None
        return self.dense(fast_unpack).to(dtype) if dense_OC is None or dense_OC.dtype != dtype else dense_OC

    def extra_repr(self) -> str:
        """Width and quantizer in `print(model)`."""
        return f"columns={self.columns}, {self.spec}"


class PackedLinear(nn.Module):
    """A linear whose weight is packed integer codes and scales: what the artifact stores and runs.

    Args:
        segments: The weight's columns.
        bias: [O] or None.
        input_quantizer: Quantizer of this linear's own input, or an identity.
    """

    segments: Sequence[PackedSegment]
    bias: Tensor | None
    held_OI: Tensor | None

    def __init__(self, segments: Sequence[PackedSegment], bias: Tensor | None, input_quantizer: nn.Module) -> None:
        super().__init__()
        self.register_module("segments", nn.ModuleList(segments))
        self.register_buffer("bias", bias)
        self.register_buffer("held_OI", None, persistent=False)
        self.input_quantizer = input_quantizer

    def hold_dense(self, dtype: torch.dtype) -> None:
        """Dequantize Ŵ once into `dtype`, that of the inputs, and keep it beside the codes for later passes."""
        if self.held_OI is None or self.held_OI.dtype != dtype:
            self.held_OI = side_by_side([segment.take_dense(dtype) for segment in self.segments])

    def dense_weight(self) -> Tensor:
        """Ŵ [O, I] in the wide dtype."""
        return side_by_side([segment.dense() for segment in self.segments])

    def forward(self, x_BTI: Tensor) -> Tensor:
        """⟨x⟩ Ŵᵀ + bias, in x's dtype."""
        w_OI = self.dense_weight().to(x_BTI.dtype) if self.held_OI is None else self.held_OI
        return F.linear(self.input_quantizer(x_BTI), w_OI, self.bias)
