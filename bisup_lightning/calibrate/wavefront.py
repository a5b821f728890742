"""What goes from block to block while several learn at once, each in a process of its own.

Shape suffixes: N sequences, T tokens, D hidden size, B batch, P prompt tokens.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from bisup_lightning.calibrate.parallel import Place
from bisup_lightning.data.layer_inputs import LayerInputs


class Relay:
    """A block's predecessor and its successor are both in this process, so that nothing has to travel."""

    final_inputs_come_late = False  # whether what the fused predecessor gives comes while a block learns
    stages = 1

    def blocks(self, first: int, end: int) -> range:
        """The blocks that this process calibrates."""
        return range(first, end)

    def only_passes_fp(self, block: int) -> bool:
        """Whether a block is not to be calibrated, and only full-precision inputs pass through it."""
        return False

    def should_warm_up(self, block: int) -> bool:
        """Whether a block is the first here that waits for inputs, so that there is time to compile."""
        return False

    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        """Put a block's full-precision inputs into the streams; the prompt's hidden states [1, P, D] before it."""
        return prompt_1PD

    def send_fp(self, inputs: LayerInputs, prompt_1PD: Tensor) -> None:
        """Pass on what the full-precision block makes of them."""

    def receive_final(self, inputs: LayerInputs) -> None:
        """Put the inputs that the fused predecessor gives into the streams."""

    def send_final(self, outputs_NTD: Tensor) -> None:
        """Pass on what the fused block gives."""

    def close(self) -> None:
        """Wait until all is received that was sent."""

    def stop(self) -> None:
        """Send nothing more."""


class Chain(Relay):
    """The blocks go round several stages; each block's full-precision outputs go from stage to stage.

    A block's target and the prompt's hidden states behind it are sent to its successor as soon as they are known.

    Args:
        run: The blocks, from the first to the last.
        place: Which stage this process belongs to, and its neighbours.
        stream: What each stream is like, [N, T, D].
        prompt_1PD: Likewise for the prompt.
    """

    def __init__(self, run: range, place: Place, stream: Tensor, prompt_1PD: Tensor) -> None:
        self.run, self.place, self.stages = run, place, place.stages
        self._stream, self._prompt = (torch.empty_like(x, device="meta") for x in (stream, prompt_1PD))
        self.block = -1
        if place.upstream is not None:
            own = self.blocks(self.run.start, self.run.stop)
            place.upstream.expect(x for block in own if block > self.run.start for x in self._messages())

    def _messages(self) -> Iterator[Tensor]:
        """What reaches a block from its predecessor, in order."""
        yield self._stream
        if self._prompt.numel():
            yield self._prompt

    @override
    def blocks(self, first: int, end: int) -> range:
        return self.run[self.place.stage :: self.stages]

    @override
    def should_warm_up(self, block: int) -> bool:
        return self.block < self.run.start < block

    @override
    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        self.block = block
        if self.place.upstream is None or block == self.run.start:  # which has its inputs already
            return prompt_1PD
        inputs.fp = inputs.home.hold(self.place.upstream.receive())
        return self.place.upstream.receive() if prompt_1PD.numel() else prompt_1PD

    @override
    def send_fp(self, inputs: LayerInputs, prompt_1PD: Tensor) -> None:
        if self.place.downstream is not None and self.block + 1 < self.run.stop:
            self.place.downstream.send(inputs.fp)
            if prompt_1PD.numel():
                self.place.downstream.send(prompt_1PD)

    @override
    def close(self) -> None:
        if self.place.downstream is not None:
            self.place.downstream.flush()

    @override
    def stop(self) -> None:
        if self.place.downstream is not None:
            self.place.downstream.stop()


class Independent(Chain):
    """Every block is calibrated on full-precision inputs, so that any of them may be.

    Args:
        wanted: The blocks to calibrate; inputs merely pass through those before.
        finished: Blocks that are finished already.
        place: See `Chain`.
        stream: Likewise.
        prompt_1PD: Likewise.
    """

    def __init__(
        self, wanted: range, finished: Collection[int], place: Place, stream: Tensor, prompt_1PD: Tensor
    ) -> None:
        self.wanted, self.finished = wanted, finished
        super().__init__(range(wanted.stop), place, stream, prompt_1PD)

    @override
    def only_passes_fp(self, block: int) -> bool:
        return block not in self.wanted or block in self.finished


class Wavefront(Chain):
    """Several stages calibrate blocks that follow each other at the same time.

    A block learns on full-precision inputs in all epochs but the last, and in that on what its fused predecessor gives.

    Args:
        run: The blocks that are not finished.
        place: See `Chain`.
        stream: Likewise.
        prompt_1PD: Likewise.
    """

    final_inputs_come_late = True

    def __init__(self, run: range, place: Place, stream: Tensor, prompt_1PD: Tensor) -> None:
        super().__init__(run, place, stream, prompt_1PD)
        self._waiting = False  # whether the predecessor's outputs are still to come

    @override
    def _messages(self) -> Iterator[Tensor]:
        yield from super()._messages()
        yield self._stream

    @override
    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        prompt_1PD = super().receive_fp(block, inputs, prompt_1PD)
        self._waiting = self.place.upstream is not None and block > self.run.start
        if self._waiting:
            inputs.q = inputs.fp  # leaves no memory to what it holds, which is another block's
        return prompt_1PD

    @override
    def receive_final(self, inputs: LayerInputs) -> None:
        if self._waiting:  # for the first time; what comes later in a block's training finds them there
            assert self.place.upstream is not None
            inputs.q = inputs.home.hold(self.place.upstream.receive())
            self._waiting = False

    @override
    def send_final(self, outputs_NTD: Tensor) -> None:
        if self.place.downstream is not None and self.block + 1 < self.run.stop:
            self.place.downstream.send(outputs_NTD)
