"""Low-rank compensation of a weight (paper §4.3): A[O, r], B[r, I], with AB = 0 at the start."""

import torch
from torch import Tensor

from bisup_lightning.quant.affine import wide


def _product(w_OI: Tensor, a_OR: Tensor, b_RI: Tensor) -> Tensor:
    """AB in the wide dtype, of A and B rounded to W's dtype."""
    return wide(a_OR.to(w_OI.dtype)) @ wide(b_RI.to(w_OI.dtype))


def slrec(w_OI: Tensor, a_OR: Tensor, b_RI: Tensor) -> Tensor:
    """Stabilized form W ⊙ (1 + AB) of eq. 7: the weight anchors the correction. In the wide dtype."""
    return wide(w_OI) * (1 + _product(w_OI, a_OR, b_RI))


def lrec(w_OI: Tensor, a_OR: Tensor, b_RI: Tensor) -> Tensor:
    """Plain form W + AB of eq. 6, kept for the ablation (paper §A.3). In the wide dtype."""
    return wide(w_OI) + _product(w_OI, a_OR, b_RI)


def start(rows: int, features: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A drawn like a linear layer's weight, B zero, so that AB = 0 while B's gradient is not. Float32, on the CPU."""
    a_OR = torch.randn(rows, rank, generator=generator) * rank**-0.5
    return a_OR, torch.zeros(rank, features)
