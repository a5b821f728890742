"""What passes through a block's linear inputs while it runs."""

import torch
from torch import Tensor, nn

from bisup_lightning.model.family import linear_inputs


class Observed(nn.Module):
    """A linear that keeps figures of its last input: `absmax` and `square_sum` of every channel [I], float32.

    Args:
        linear: The linear.
    """

    absmax: Tensor
    square_sum: Tensor

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        assert isinstance(linear.weight, Tensor)
        for name in ("absmax", "square_sum"):
            self.register_buffer(name, torch.zeros_like(linear.weight[0], dtype=torch.float32), persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """What the linear makes of x."""
        x_TI = x_BTI.detach().flatten(0, -2).float()
        self.absmax.copy_(x_TI.abs().amax(0))
        self.square_sum.copy_(x_TI.square().sum(0))
        return self.linear(x_BTI)


class InputStatistics:
    """Figures of every channel [I] of each linear input, by its name, over forward passes of a full-precision layer.

    Args:
        layer: The layer; the first linear of each input is observed for as long as it lives.

    Attributes:
        absmax: Largest magnitude, float32.
        square_sum: Sum of squares over all tokens, float32.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.absmax: dict[str, Tensor] = {}
        self.square_sum: dict[str, Tensor] = {}
        self._observed: dict[str, Observed] = {}
        for entry, linears in linear_inputs(layer):
            self._observed[entry.name] = Observed(linears[0])
            layer.set_submodule(entry.linears[0], self._observed[entry.name])

    def add_pass(self) -> None:
        """Add the figures of the last forward pass. One that ran out of memory is repeated: add only the repetition."""
        for name, observed in self._observed.items():
            if name in self.absmax:
                torch.maximum(self.absmax[name], observed.absmax, out=self.absmax[name])
                self.square_sum[name] += observed.square_sum
            else:
                self.absmax[name], self.square_sum[name] = observed.absmax.clone(), observed.square_sum.clone()
