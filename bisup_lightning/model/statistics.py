"""What passes through a block's linear inputs while it runs."""

import torch
from torch import Tensor, nn

from bisup_lightning.model.family import LinearInput, linear_inputs


class InputStatistics:
    """Gathers, while a full-precision layer runs, figures of every channel [I] of each linear input, by its name.

    Args:
        layer: The layer; it is watched for as long as it lives.

    Attributes:
        absmax: Largest magnitude, float32.
        square_sum: Sum of squares over all tokens, float32.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.absmax: dict[str, Tensor] = {}
        self.square_sum: dict[str, Tensor] = {}
        for entry, linears in linear_inputs(layer):
            linears[0].register_forward_pre_hook(self._hook(entry))

    def _hook(self, entry: LinearInput):
        def record(module: nn.Module, arguments: tuple[Tensor]) -> None:
            x_TI = arguments[0].detach().flatten(0, -2).float()
            absmax_I, square_sum_I = x_TI.abs().amax(0), x_TI.square().sum(0)
            if entry.name in self.absmax:
                absmax_I = torch.maximum(absmax_I, self.absmax[entry.name])
                square_sum_I = square_sum_I + self.square_sum[entry.name]
            self.absmax[entry.name], self.square_sum[entry.name] = absmax_I, square_sum_I

        return record
