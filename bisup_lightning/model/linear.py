"""Linears and norms that quantize. A QuantLinear learns; fused, it becomes a PackedLinear that only computes.

Shape suffixes: B sequences, T tokens, O output rows, I input features, G groups, R rank.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bisup_lightning.quant import low_rank
from bisup_lightning.quant.affine import as_stored, dequantize, fake_quantize, quantize, wide
from bisup_lightning.quant.packing import pack, unpack
from bisup_lightning.quant.spec import QuantSpec

LowRankForm = Literal["slrec", "lrec"]
LOW_RANK = {"slrec": low_rank.slrec, "lrec": low_rank.lrec}


class InputQuantizer(nn.Module):
    """Quantizes the activation that one or several linears read, once for all of them.

    Args:
        features: Size I of the activation's last dimension.
        spec: Its quantizer; granularity `tensor` gives one clip value (WAC), any other one for each group (FWAC).
        clip: Start of the clip values c[G] (paper §4.1; 0.9 for activations).
        storage_dtype: Dtype that the clip values are stored in.
    """

    def __init__(self, features: int, spec: QuantSpec, clip: float, storage_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.spec, self.storage_dtype = spec, storage_dtype
        self.clip = nn.Parameter(torch.full((1 if spec.granularity == "tensor" else spec.groups(features),), clip))

    def forward(self, x_BTI: Tensor) -> Tensor:
        """⟨x⟩ in x's dtype."""
        return fake_quantize(x_BTI, self.spec, as_stored(self.clip, self.storage_dtype))

    def extra_repr(self) -> str:
        """The quantizer in `print(model)`."""
        return str(self.spec)


class QuantNorm(nn.Module):
    """A norm whose output is quantized for the linears it feeds; s1 smooths between the two (paper §4.2).

    Args:
        norm: The block's own norm, with its weight [I].
        quantizer: Quantizer of the norm's output, or an identity.
        storage_dtype: Dtype that the norm's weight is stored in.
    """

    def __init__(self, norm: nn.Module, quantizer: nn.Module, storage_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm, self.quantizer, self.storage_dtype = norm, quantizer, storage_dtype
        self.register_parameter("smoothing", None)

    def smoothed_weight(self) -> Tensor:
        """The norm's weight times s1, as it will be stored."""
        return as_stored(self.norm.weight * self.smoothing, self.storage_dtype).to(self.norm.weight.dtype)

    def forward(self, x_BTI: Tensor) -> Tensor:
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
        weight: W [O, I].
        bias: [O] or None.
        spec: The weight's quantizer.
        clip: Start of the clip values, shaped `spec.clip_shape(O, I)`.
        input_quantizer: Quantizer of this linear's own input; an identity where a QuantNorm already quantized it.
        scale_dtype: Dtype that the scales are stored in.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        clip: Tensor,
        input_quantizer: nn.Module,
        scale_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.spec, self.scale_dtype = spec, scale_dtype
        self.input_quantizer = input_quantizer
        self.clip = nn.Parameter(clip)
        self.smoothing_is_inverse = False
        self.low_rank_form: LowRankForm = "slrec"
        for name in ("smoothing", "low_rank_a", "low_rank_b"):
            self.register_parameter(name, None)

    def add_smoothing(self, smoothing: nn.Parameter, is_inverse: bool = False) -> None:
        """Give this linear its s2[I], or, with `is_inverse`, the norm's s1 to divide by (WAS)."""
        self.smoothing, self.smoothing_is_inverse = smoothing, is_inverse

    def add_low_rank(self, form: LowRankForm, a_OR: Tensor, b_RI: Tensor) -> None:
        """Give this linear its low-rank compensation."""
        self.low_rank_form = form
        self.low_rank_a, self.low_rank_b = nn.Parameter(a_OR), nn.Parameter(b_RI)

    def compensated_weight(self) -> Tensor:
        """(W ⊙ (1 + AB)) · s2 [O, I] before quantization, in the wide dtype."""
        w_OI = self.weight
        if self.low_rank_a is not None:
            w_OI = LOW_RANK[self.low_rank_form](w_OI, self.low_rank_a, self.low_rank_b)
        if self.smoothing is not None:
            w_OI = w_OI / self.smoothing if self.smoothing_is_inverse else w_OI * self.smoothing
        return wide(w_OI)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """⟨x⟩ Ŵᵀ + bias, in x's dtype."""
        w_OI = fake_quantize(self.compensated_weight(), self.spec, self.clip, self.scale_dtype)
        return F.linear(self.input_quantizer(x_BTI), w_OI.to(x_BTI.dtype), self.bias)

    @torch.no_grad()
    def fuse(self) -> "PackedLinear":
        """The linear with Θ folded in and the weight as integer codes; it computes the same output."""
        codes_OI, scale_OG, _ = quantize(self.compensated_weight(), self.spec, self.clip, self.scale_dtype)
        return PackedLinear.from_codes(codes_OI, scale_OG, self.spec, self.bias, self.input_quantizer)


class PackedLinear(nn.Module):
    """A linear whose weight is packed integer codes and scales: what the artifact stores and runs.

    Args:
        out_features: O.
        in_features: I.
        spec: The weight's quantizer (symmetric).
        bias: Whether there is a bias [O].
        input_quantizer: Quantizer of this linear's own input, or an identity.
    """

    def __init__(
        self, out_features: int, in_features: int, spec: QuantSpec, bias: bool, input_quantizer: nn.Module
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.input_quantizer = input_quantizer
        codes = torch.empty(out_features, spec.bits, -(-in_features // 8), dtype=torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.empty(out_features, spec.groups(in_features)))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    @classmethod
    def from_codes(
        cls, codes_OI: Tensor, scale_OG: Tensor, spec: QuantSpec, bias: Tensor | None, input_quantizer: nn.Module
    ) -> "PackedLinear":
        """Pack codes [O, I] with their scales [O, G]."""
        with torch.device("meta"):
            linear = cls(*codes_OI.shape, spec, bias is not None, nn.Identity())
        linear.codes, linear.scale = pack(codes_OI, spec.bits, spec.qmin), scale_OG
        linear.bias, linear.input_quantizer = bias, input_quantizer
        return linear

    def dense_weight(self) -> Tensor:
        """Ŵ [O, I] in the wide dtype."""
        return dequantize(unpack(self.codes, self.in_features, self.spec.qmin), self.scale)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """⟨x⟩ Ŵᵀ + bias, in x's dtype."""
        return F.linear(self.input_quantizer(x_BTI), self.dense_weight().to(x_BTI.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and quantizer in `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"
