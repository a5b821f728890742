"""A step on a GPU that is recorded once and replayed: the host launches one graph instead of several hundred kernels.

Shape suffixes: B sequences, T tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bisup_lightning.data.streams import side_stream

Gradients = tuple[Tensor | None, ...]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Gradients]]


class RecordedStep:
    """The loss of a batch and its gradients as a CUDA graph: the very kernels of the step that was recorded.

    Hooks of the block's modules are not called when it is replayed.

    Args:
        step: Gives loss and gradients from inputs and target. It has run before, so that all is compiled and in place;
            what else it depends on, the parameters, changes in place alone.
        x_BTD: Inputs such as those of the steps to come.
        target_BTD: Target likewise.

    Raises:
        RuntimeError: If there is no memory for another step, beside what is kept for those that are not recorded.
    """

    def __init__(self, step: Step, x_BTD: Tensor, target_BTD: Tensor) -> None:
        device = x_BTD.device
        self.batch = x_BTD.clone(), target_BTD.clone()
        self.graph = torch.cuda.CUDAGraph()
        if torch.cuda.mem_get_info(device)[0] < torch.cuda.memory_reserved(device):
            torch.cuda.empty_cache()  # the graph has its own memory, beside what earlier steps left
        current, side = torch.cuda.current_stream(device), side_stream("recording", device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.graph.capture_begin(capture_error_mode="thread_local")  # other threads read and write meanwhile
            try:
                self.found = step(*self.batch)
            except BaseException:
                with suppress(RuntimeError):  # of a graph that is not whole
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        current.wait_stream(side)

    def takes(self, x_BTD: Tensor) -> bool:
        """Whether a batch has the shape that was recorded."""
        return x_BTD.shape == self.batch[0].shape

    def __call__(self, x_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Gradients]:
        """Loss and gradients, until the next call."""
        for recorded, given in zip(self.batch, (x_BTD, target_BTD), strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.found


def with_gradients(loss: Tensor, gradients: Gradients, parameters: Sequence[Tensor]) -> Tensor:
    """A loss whose backward pass gives gradients that are known already."""
    result: Tensor = _WithGradients.apply(loss, gradients, *parameters)
    return result


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()  # a replay would overwrite it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = iter(torch._foreach_mul([gradient for gradient in ctx.gradients if gradient is not None], grad))
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)
