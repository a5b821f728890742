"""A step on a GPU that is recorded once and replayed: the host launches one graph instead of several hundred kernels.

Shape suffixes: B sequences, T tokens, D hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bisup_lightning.data.transfer import side_stream
from bisup_lightning.model.block import theta_parameters
from bisup_lightning.model.blockwise import Positions
from bisup_lightning.model.kv import BlockKV

Gradients = tuple[Tensor | None, ...]
Step = Callable[[nn.Module, Tensor, Tensor, Positions, BlockKV], tuple[Tensor, Gradients]]


class RecordedStep:
    """The loss of a batch and the gradients of Θ as a CUDA graph, for one block after another.

    The graph computes with a twin of the block that it was recorded with. A block that learns gives it copies of W and
    the like, and keeps its Θ in the twin's until it leaves. Hooks of its modules are not called.

    Args:
        step: Gives loss and gradients. It has run before, so that all is compiled.
        layer: A quantized layer with Θ.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        x_BTD: Inputs such as those of the steps to come.
        target_BTD: Target likewise.

    Raises:
        RuntimeError: If there is no memory for a copy of the block and for another step, beside what is kept for those
            that are not recorded.
    """

    def __init__(
        self, step: Step, layer: nn.Module, positions: Positions, kv: BlockKV, x_BTD: Tensor, target_BTD: Tensor
    ) -> None:
        self.batch = x_BTD.clone(), target_BTD.clone()
        self.twin, self.positions, self.kv = copy.deepcopy(layer), positions, kv.copy()
        self.found, self.replay = record(lambda: step(self.twin, *self.batch, self.positions, self.kv), x_BTD.device)
        self.follow(layer, kv)

    def __deepcopy__(self, memo: Any) -> None:
        """None, as a graph can't be copied: whoever copies a block that learns gets one with a Θ of its own."""

    @property
    def length(self) -> int:
        """Sequences in a batch."""
        return len(self.batch[0])

    def fits(self, layer: nn.Module, positions: Positions, kv: BlockKV, micro_batch: int | None = None) -> bool:
        """Whether the graph computes what another block of this walk does, given its tensors, on no larger batches."""
        if micro_batch is not None and self.length > micro_batch:
            return False
        own, given = (
            {name: (x.shape, x.dtype) for name, x in _tensors(*block).items()}
            for block in ((self.twin, self.kv), (layer, kv))
        )
        return positions is self.positions and kv.quantizer is self.kv.quantizer and own == given

    @torch.no_grad()
    def follow(self, layer: nn.Module, kv: BlockKV) -> None:
        """Compute for another block, which fits."""
        own, given = _tensors(self.twin, self.kv), _tensors(layer, kv)
        torch._foreach_copy_(list(own.values()), [given[name] for name in own])
        self.learned = theta_parameters(layer)
        for name, parameter in self.learned.items():
            parameter.data = own[name].data

    def leave(self) -> None:
        """Give the block that learned its Θ back, which the next one would overwrite."""
        for parameter in self.learned.values():
            parameter.data = parameter.data.clone()
        self.learned = {}

    def takes(self, x_BTD: Tensor) -> bool:
        """Whether a batch has the shape that was recorded."""
        return x_BTD.shape == self.batch[0].shape

    @torch.no_grad()
    def __call__(self, x_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Gradients]:
        """Loss and gradients, until the next call."""
        torch._foreach_copy_(self.batch, [x_BTD, target_BTD])
        self.replay()
        return self.found


def _tensors(layer: nn.Module, kv: BlockKV) -> dict[str, Tensor]:
    prompt = {} if kv.prompt is None else dict(zip(("prompt's keys", "prompt's values"), kv.prompt, strict=True))
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **prompt}


def records(device: torch.device) -> bool:
    """Whether steps can be recorded there."""
    return device.type == "cuda"


def leaves_room(device: torch.device) -> bool:
    """Whether as much of a GPU's memory is free as this process has taken, for whatever others do with it."""
    taken, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    return min(free, torch.cuda.get_per_process_memory_fraction(device) * total - taken) >= taken


def record(
    run: Callable[[], tuple[Tensor, Gradients]], device: torch.device
) -> tuple[tuple[Tensor, Gradients], Callable[[], None]]:
    """Record what a GPU does, on a stream of its own; what comes out of it, and what does it again."""
    graph = torch.cuda.CUDAGraph()
    if not leaves_room(device):
        torch.cuda.empty_cache()  # the graph has its own memory, beside what earlier steps left
    current, side = torch.cuda.current_stream(device), side_stream("recording", device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads read and write meanwhile
        try:
            found = run()
        except BaseException:
            with suppress(RuntimeError):  # of a graph that is not whole
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(side)
    return found, graph.replay


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
