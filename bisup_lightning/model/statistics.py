"""What passes through a block's linear inputs while it runs."""

import torch
from torch import Tensor, nn

from bisup_lightning.model.family import LinearInput, linear_inputs


class InputStatistics:
    """Gathers, while a full-precision layer runs, figures of every channel [I] of each linear input, by its name.

    A forward pass counts when it is complete: one that ran out of memory and is taken again counts once.

    Args:
        layer: The layer; it is watched for as long as it lives.

    Attributes:
        absmax: Largest magnitude, float32.
        square_sum: Sum of squares over all tokens, float32.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.absmax: dict[str, Tensor] = {}
        self.square_sum: dict[str, Tensor] = {}
        self._pass: dict[str, tuple[Tensor, Tensor]] = {}  # of the forward pass at hand
        for entry, linears in linear_inputs(layer):
            linears[0].register_forward_pre_hook(self._hook(entry))
        layer.register_forward_hook(self._add)

    def _hook(self, entry: LinearInput):
        def record(module: nn.Module, arguments: tuple[Tensor]) -> None:
            x_TI = arguments[0].detach().flatten(0, -2).float()
            self._pass[entry.name] = x_TI.abs().amax(0), x_TI.square().sum(0)

        return record

    def _add(self, layer: nn.Module, arguments: object, output: object) -> None:
        for name, (absmax_I, square_sum_I) in self._pass.items():
            if name in self.absmax:
                absmax_I = torch.maximum(absmax_I, self.absmax[name])
                square_sum_I = square_sum_I + self.square_sum[name]
            self.absmax[name], self.square_sum[name] = absmax_I, square_sum_I
        self._pass.clear()
