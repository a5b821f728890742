"""A training step as a CUDA graph, captured once and replayed: one launch instead of several hundred.

Shape suffixes: B sequences, T tokens, D hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bisup_lightning.data.transfer import side_stream
from bisup_lightning.model.blockwise import Positions
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.model.theta import theta_parameters

Gradients = tuple[Tensor | None, ...]
Step = Callable[[nn.Module, Tensor, Tensor, Positions, BlockKV], tuple[Tensor, Gradients]]


class CapturedStep:
    """The loss of a batch and the gradients of Θ as a CUDA graph, for one block after another.

    The graph computes with the tensors of `static_layer`, a copy of the block that it was captured with. The W and the
    like of a block that is attached are copied there, and its Θ shares that layer's memory until it is detached. Hooks
    of its modules are not called.

    Args:
        step: Gives loss and gradients. It has run before, so that all is compiled.
        layer: A quantized layer with Θ.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        x_BTD: Inputs such as those of the steps to come.
        target_BTD: Target likewise.

    Raises:
        RuntimeError: If there is no memory for a copy of the block and for another step, beside what is kept for those
            that are not captured.
    """

    def __init__(
        self, step: Step, layer: nn.Module, positions: Positions, kv: BlockKV, x_BTD: Tensor, target_BTD: Tensor
    ) -> None:
        self.static_batch = x_BTD.clone(), target_BTD.clone()
        self.static_layer, self.positions, self.kv = copy.deepcopy(layer), positions, kv.copy()
        self.outputs, self.replay = capture(
            lambda: step(self.static_layer, *self.static_batch, self.positions, self.kv), x_BTD.device
        )
        self.attach(layer, kv)

    def __deepcopy__(self, memo: Any) -> None:
        """None, as a graph can't be copied: whoever copies a block that learns gets one with a Θ of its own."""

    @property
    def length(self) -> int:
        """Sequences in a batch."""
        return len(self.static_batch[0])

    def fits(self, layer: nn.Module, positions: Positions, kv: BlockKV, micro_batch: int | None = None) -> bool:
        """Whether the graph computes what another block of this walk does, given its tensors, on no larger batches."""
        if micro_batch is not None and self.length > micro_batch:
            return False
        own, given = (
            {name: (x.shape, x.dtype) for name, x in _tensors(*block).items()}
            for block in ((self.static_layer, self.kv), (layer, kv))
        )
        return positions is self.positions and kv.quantizer is self.kv.quantizer and own == given

    @torch.no_grad()
    def attach(self, layer: nn.Module, kv: BlockKV) -> None:
        """Let the graph compute for a block that fits it.

        Its frozen tensors and the prompt's keys and values are copied to where the graph reads; its Θ moves there, so
        that the optimizer updates what the graph reads.
        """
        own, given = _tensors(self.static_layer, self.kv), _tensors(layer, kv)
        torch._foreach_copy_(list(own.values()), [given[name] for name in own])
        self.attached = theta_parameters(layer)
        for name, parameter in self.attached.items():
            parameter.data = own[name].data

    def detach(self) -> None:
        """Give the attached block's Θ memory of its own, before another block's takes that place."""
        for parameter in self.attached.values():
            parameter.data = parameter.data.clone()
        self.attached = {}

    def matches(self, x_BTD: Tensor) -> bool:
        """Whether a batch has the captured shape."""
        return x_BTD.shape == self.static_batch[0].shape

    @torch.no_grad()
    def __call__(self, x_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Gradients]:
        """Loss and gradients, until the next call."""
        torch._foreach_copy_(self.static_batch, [x_BTD, target_BTD])
        self.replay()
        return self.outputs


def _tensors(layer: nn.Module, kv: BlockKV) -> dict[str, Tensor]:
    prompt = {} if kv.prompt is None else dict(zip(("prompt's keys", "prompt's values"), kv.prompt, strict=True))
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **prompt}


def can_capture(device: torch.device) -> bool:
    """Whether it has graphs."""
    return device.type == "cuda"


def leaves_room(device: torch.device) -> bool:
    """Whether as much of a GPU's memory is free as this process has taken, for whatever others do with it."""
    taken, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    return min(free, torch.cuda.get_per_process_memory_fraction(device) * total - taken) >= taken


def capture(
    run: Callable[[], tuple[Tensor, Gradients]], device: torch.device
) -> tuple[tuple[Tensor, Gradients], Callable[[], None]]:
    """Capture what a GPU does, on a stream of its own.

    `torch.cuda.graph` would wait for the GPU and empty the caches first.

    Returns:
        The outputs, which each replay overwrites, and the replay.
    """
    graph = torch.cuda.CUDAGraph()
    if not leaves_room(device):
        torch.cuda.empty_cache()  # the graph has its own memory, beside what earlier steps left
    current, side = torch.cuda.current_stream(device), side_stream("capturing", device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads read and write meanwhile
        try:
            outputs = run()
        except BaseException:
            with suppress(RuntimeError):  # of a graph that is not whole
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(side)
    return outputs, graph.replay


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
