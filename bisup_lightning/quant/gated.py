"""The two factors of an MLP's last input, not yet multiplied: the kernel that quantizes the product can form it."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gated:
    """silu(gate) · up.

    Args:
        gate: [..., I].
        up: [..., I] likewise.
    """

    gate: Tensor
    up: Tensor

    def product(self) -> Tensor:
        """silu(gate) · up [..., I], as the model itself computes it."""
        return F.silu(self.gate) * self.up
