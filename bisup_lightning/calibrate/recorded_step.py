"""A step on a GPU that is recorded once and replayed: the host launches one graph instead of several hundred kernels.

Shape suffixes: B sequences, T tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RecordedStep:
    """Forward and backward pass of one batch as a CUDA graph: the very kernels of the step that was recorded.

    Hooks of the block's modules are not called when it is replayed.

    Args:
        loss: Gives the loss of inputs and target. It has run before, so that all is compiled and in place; nothing that
            it gave is alive, or its autograd graph would tie this one to another stream.
        parameters: What the loss depends on; they change in place from step to step, and nothing else does.
        x_BTD: Inputs such as those of the steps to come.
        target_BTD: Target likewise.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        x_BTD: Tensor,
        target_BTD: Tensor,
    ) -> None:
        self.parameters = tuple(parameters)
        self.batch = x_BTD.clone(), target_BTD.clone()
        self.graph = torch.cuda.CUDAGraph()
        if torch.cuda.mem_get_info(x_BTD.device)[0] < torch.cuda.memory_reserved(x_BTD.device):
            torch.cuda.empty_cache()  # the graph has its own memory, beside what earlier steps left
        current, side = torch.cuda.current_stream(x_BTD.device), torch.cuda.Stream(x_BTD.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.graph.capture_begin(capture_error_mode="thread_local")  # other threads read and write meanwhile
            try:
                result = loss(*self.batch)
                self.gradients = torch.autograd.grad(result, self.parameters, allow_unused=True)
                self.loss = result.detach()
            finally:
                self.graph.capture_end()
        current.wait_stream(side)

    def takes(self, x_BTD: Tensor) -> bool:
        """Whether a batch has the shape that was recorded."""
        return x_BTD.shape == self.batch[0].shape

    def __call__(self, x_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """The loss, whose backward pass has been made already."""
        for recorded, given in zip(self.batch, (x_BTD, target_BTD), strict=True):
            recorded.copy_(given)
        self.graph.replay()
        loss: Tensor = _WithGradients.apply(self.loss, self.gradients, *self.parameters)
        return loss


class _WithGradients(torch.autograd.Function):
    """A loss, given its gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()  # the next replay overwrites it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = iter(torch._foreach_mul([gradient for gradient in ctx.gradients if gradient is not None], grad))
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)
