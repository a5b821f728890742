"""Θ, what is learned of a block (paper §4): clip values, smoothing vectors, and low-rank matrices.

Shape suffixes: O outputs and I inputs of a linear, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bisup_lightning.model.block import is_clip, part
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.model.linear import InputQuantizer, QuantLinear, QuantNorm
from bisup_lightning.quant import low_rank

ThetaKind = Literal["clip", "smoothing", "low_rank"]


@dataclass(frozen=True)
class Theta:
    """Which tensors of a block are learned, Θ = {Θ1, Θ2, Θ3} of paper §4.4.

    Args:
        clip: Learn clip values (Θ1, §4.1).
        smoothing: Learn smoothing vectors (Θ2, §4.2): `soft` frees s1 and s2 of each other (SWAS), `hard` ties s2 to
            1/s1 (WAS), `none` leaves them out.
        smoothing_start: Start at s1 = 1/s, s2 = s of the `smoothquant` formula with alpha 0.5, or at `ones`;
            `auto` takes ones on a rotated model, whose channels are alike, and smoothquant elsewhere.
        low_rank: Learn a low-rank compensation (Θ3, §4.3): `slrec` for W(1 + AB), `lrec` for W + AB, or `none`.
        rank: Inner size r of A and B.
    """

    clip: bool = True
    smoothing: Literal["soft", "hard", "none"] = "soft"
    smoothing_start: Literal["auto", "smoothquant", "ones"] = "auto"
    low_rank: Literal["slrec", "lrec", "none"] = "slrec"
    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"solver.theta.rank must be at least 1, not {self.rank}")
        if not self.clip and self.smoothing == self.low_rank == "none":
            raise ValueError("solver.theta: nothing is left to learn; choose the solver RTN for that")


def draw_low_rank(
    shapes: Iterable[Sequence[int]], theta: Theta, generator: torch.Generator, pinned: bool
) -> list[tuple[Tensor, Tensor]]:
    """A [O, r] and B [r, I] of a layer's linears at their start, on the host.

    Args:
        shapes: Of the weights [O, I], in the order of LINEAR_INPUTS.
        theta: What to learn; the list is empty if no such matrices are.
        generator: Draws A.
        pinned: Whether they go to a GPU, which copies from pinned memory while it computes.
    """
    if theta.low_rank == "none":
        return []
    drawn = [low_rank.start(rows, features, theta.rank, generator) for rows, features in shapes]
    return [(a_OR.pin_memory(), b_RI.pin_memory()) for a_OR, b_RI in drawn] if pinned else drawn


def add_theta(
    layer: nn.Module,
    theta: Theta,
    generator: torch.Generator,
    absmax: Mapping[str, Tensor] | None = None,
    drawn: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Give a quantized layer its learnable tensors, in place; at a start of ones its output stays what it was.

    Args:
        layer: A layer from `quantize_layer`.
        theta: What to learn.
        generator: Draws A.
        absmax: Largest magnitude of each channel of each linear input [I], by its name; `smoothquant` needs it.
        drawn: What `draw_low_rank` gives, if that is known already.

    Raises:
        KeyError: If `smoothquant` lacks the figures of an input.
    """
    absmax = absmax or {}
    rotated = any(isinstance(module, InputQuantizer) and module.rotated for module in layer.modules())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(theta.clip and is_clip(name))
    weights = [part(layer, name, QuantLinear).weight for entry in LINEAR_INPUTS for name in entry.linears]
    if drawn is None:
        drawn = draw_low_rank((weight.shape for weight in weights), theta, generator, weights[0].is_cuda)
    matrices = iter(drawn)
    for entry in LINEAR_INPUTS:
        linears = [part(layer, name, QuantLinear) for name in entry.linears]
        if entry.norm is not None and theta.smoothing != "none":
            norm = part(layer, entry.norm, QuantNorm)
            order = norm.quantizer.order
            s_I = torch.ones_like(linears[0].weight[0], dtype=torch.float32)
            if theta.smoothing_start == "smoothquant" or (theta.smoothing_start == "auto" and not rotated):
                s_I = _smoothquant(absmax[entry.name], linears, order)
            norm.smoothing = nn.Parameter(1 / s_I)
            for linear in linears:
                if theta.smoothing == "hard":
                    linear.tie_smoothing(norm.smoothing, order)
                else:
                    linear.add_smoothing(nn.Parameter((s_I if order is None else s_I[order]).clone()))
        if theta.low_rank != "none":
            for linear in linears:
                a_OR, b_RI = (matrix.to(linear.weight.device, non_blocking=True) for matrix in next(matrices))
                linear.add_low_rank(theta.low_rank, a_OR, b_RI)


def _smoothquant(absmax_I: Tensor, linears: list[QuantLinear], order_I: Tensor | None, alpha: float = 0.5) -> Tensor:
    """max|X|^α / max|W|^(1−α) for each channel (SmoothQuant, eq. 4), scaled to a geometric mean of one."""
    weight_absmax_I = torch.stack([linear.weight.abs().amax(0).float() for linear in linears]).amax(0)
    if order_I is not None:
        weight_absmax_I = torch.empty_like(weight_absmax_I).scatter_(0, order_I.long(), weight_absmax_I)
    s_I = absmax_I.float().clamp_min(1e-5) ** alpha / weight_absmax_I.clamp_min(1e-5) ** (1 - alpha)
    return s_I / s_I.log().mean().exp()


def theta_kind(name: str) -> ThetaKind:
    """What a learnable tensor of a layer is, by its name."""
    if is_clip(name):
        return "clip"
    return "smoothing" if name.endswith("smoothing") else "low_rank"


def theta_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The learnable tensors of a layer by name, each once."""
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def theta_by_kind(layer: nn.Module) -> dict[str, list[Tensor]]:
    """The values of a layer's Θ: `weight_clip`, `activation_clip`, `s1`, `s2` and `low_rank`, the products AB [O, I].

    Kinds that nothing in the layer has are left out; so are clip values of what is not quantized.
    """
    kinds: dict[str, list[Tensor]] = {}
    for module in layer.modules():
        if isinstance(module, QuantNorm) and module.smoothing is not None:
            kinds.setdefault("s1", []).append(module.smoothing)
        if isinstance(module, InputQuantizer | QuantLinear):
            kind = "weight_clip" if isinstance(module, QuantLinear) else "activation_clip"
            pairs = zip(module.segments, module.clips, strict=True)
            kinds.setdefault(kind, []).extend(clip for segment, clip in pairs if segment.spec is not None)
        if isinstance(module, QuantLinear) and module.smoothing is not None:
            s_I = module.smoothing
            kinds.setdefault("s2", []).append(1 / s_I if module.smoothing_is_inverse else s_I)
        if isinstance(module, QuantLinear) and module.low_rank_a is not None and module.low_rank_b is not None:
            kinds.setdefault("low_rank", []).append(module.low_rank_a @ module.low_rank_b)
    return {kind: tensors for kind, tensors in kinds.items() if tensors}
