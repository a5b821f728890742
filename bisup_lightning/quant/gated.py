"""What an MLP's last linear reads, before it is computed: a kernel that rounds it can do that on the way."""

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
        """As the model itself computes it."""
        return F.silu(self.gate) * self.up
