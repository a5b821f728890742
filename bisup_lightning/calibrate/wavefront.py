"""What goes from block to block while several learn at once, each in a process of its own.

Shape suffixes: N sequences, T tokens, D hidden size, B batch, P prompt tokens.
"""

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from bisup_lightning.calibrate.parallel import Front, Place, Ranks, front_name
from bisup_lightning.data.layer_inputs import LayerInputs


class Relay:
    """A block's predecessor and its successor are both in this process, so that nothing has to travel."""

    arriving = False  # whether a block's inputs are replaced by newer ones while it learns
    stages = 1

    def blocks(self, first: int, end: int) -> range:
        """The blocks that this process calibrates."""
        return range(first, end)

    def is_finished(self, block: int) -> bool:
        """Whether a block was finished before this process began, and only full-precision inputs pass through it."""
        return False

    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        """Put a block's full-precision inputs into the streams; the prompt's hidden states [1, P, D] before it."""
        return prompt_1PD

    def send_fp(self, inputs: LayerInputs, prompt_1PD: Tensor) -> None:
        """Pass on what the full-precision block makes of them."""

    def begin_epoch(self, epoch: int) -> None:
        """Put the inputs that a block trains on in an epoch into the streams."""

    def record(self, rows_B: Tensor, output_BTD: Tensor) -> None:
        """Take note of what a training pass gave, by rows of the streams."""

    def end_epoch(self, epoch: int) -> None:
        """Take note that all rows have passed."""

    def receive_final(self) -> None:
        """Put the inputs that the fused predecessor gives into the streams."""

    def send_final(self, outputs_NTD: Tensor) -> None:
        """Pass on what the fused block gives."""

    def close(self) -> None:
        """Wait until all is received that was sent."""

    def stop(self) -> None:
        """Send nothing more."""

    def state_dict(self) -> dict[str, Any]:
        """What must be known again where training goes on from a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know it again."""


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
            place.upstream.expect(self._messages(place.upstream.device))

    def _messages(self, device: torch.device) -> Iterator[Tensor]:
        for block in self.blocks(self.run.start, self.run.stop):
            if block > self.run.start:
                yield torch.empty_like(self._stream, device=device)
                if self._prompt.numel():
                    yield torch.empty_like(self._prompt, device=device)
                for _ in self._versions(block):
                    yield torch.empty_like(self._stream, device=device)

    def _versions(self, block: int) -> list[int]:
        """Versions of its quantized inputs that still reach a block, in order."""
        return []

    def blocks(self, first: int, end: int) -> range:
        """The stage's own."""
        return self.run[self.place.stage :: self.stages]

    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        """From the predecessor; the first block has them already."""
        self.block = block
        if self.place.upstream is None or block == self.run.start:
            return prompt_1PD
        inputs.fp = inputs.home.hold(self.place.upstream.receive())
        return self.place.upstream.receive() if prompt_1PD.numel() else prompt_1PD

    def send_fp(self, inputs: LayerInputs, prompt_1PD: Tensor) -> None:
        """To the successor, if there is one."""
        if self.place.downstream is not None and self.block + 1 < self.run.stop:
            self.place.downstream.send(inputs.fp)
            if prompt_1PD.numel():
                self.place.downstream.send(prompt_1PD)

    def close(self) -> None:
        """See that the successor gets it all."""
        if self.place.downstream is not None:
            self.place.downstream.flush()

    def stop(self) -> None:
        """Even what was not asked for."""
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

    def is_finished(self, block: int) -> bool:
        """Whether there is nothing to do."""
        return block not in self.wanted or block in self.finished


class Wavefront(Chain):
    """Several stages calibrate blocks that follow each other at the same time (see `Schedule`).

    What a block gives follows its target epoch by epoch: during training from the training passes themselves, so that
    no pass is paid for it, and last from the fused block.

    Args:
        front: Where all stages begin, or go on.
        ranks: All processes.
        place: See `Chain`.
        stream: Likewise.
        prompt_1PD: Likewise.
    """

    arriving = True

    def __init__(self, front: Front, ranks: Ranks, place: Place, stream: Tensor, prompt_1PD: Tensor) -> None:
        self.schedule, self.since, self.ranks = front.schedule, front.time, ranks
        super().__init__(range(front.schedule.first, front.schedule.end), place, stream, prompt_1PD)
        self._called = -1  # time of the last front that was called
        self._fronts: deque[str] = deque()
        self._on_their_way: deque[Future[None]] = deque()  # versions that were sent from a training pass
        self.inputs: LayerInputs
        self._received = self._given = -1  # newest version of the inputs in use, of the outputs passed on
        self._ahead: list[tuple[int, Tensor]] = []  # versions that were taken before their time
        self._outputs: Tensor | None = None  # of the epoch at hand, if the successor wants them
        self._rows: list[Tensor] = []  # where they are known

    def _versions(self, block: int) -> list[int]:
        return self.schedule.versions(block, self.since)

    def is_finished(self, block: int) -> bool:
        """Whether it was, when all stages stood at `since`."""
        return block < self.schedule.finished_at(self.since)

    def _wanted(self) -> list[int]:
        """Versions of the block's outputs that its successor trains on and does not have yet."""
        if self.block + 1 == self.run.stop:
            return []
        return [version for version in self._versions(self.block + 1) if version > self._given]

    def receive_fp(self, block: int, inputs: LayerInputs, prompt_1PD: Tensor) -> Tensor:
        """And begin with the block."""
        self.inputs = inputs
        self._given, self._outputs, self._rows, self._ahead = -1, None, [], []
        self._received = self.schedule.final if block == self.run.start else -1
        return super().receive_fp(block, inputs, prompt_1PD)

    def begin_epoch(self, epoch: int) -> None:
        """Take the newest inputs that are sure to be there, and make room for outputs that are wanted."""
        self._receive(self.schedule.version(self.block, epoch))
        if self._outputs is None and epoch < self.schedule.final and epoch in self._wanted():
            while len(self._on_their_way) > 1:  # no more of them in memory
                self._on_their_way.popleft().result()
            self._outputs = self.inputs.home.empty_like(self.inputs.q)

    def _receive(self, version: int) -> None:
        """Put that version into the streams, behind those before it."""
        taken = {newer for newer, _ in self._ahead}  # which a resumed run counts no longer among those that reach it
        for newer in sorted(taken.union(self._versions(self.block))):
            if self._received < newer <= version:
                if not self._ahead:
                    self._take(newer)
                self._received, self.inputs.q = self._ahead.pop(0)

    def _take(self, version: int) -> None:
        """Have all versions here, up to that one."""
        newest = self._ahead[-1][0] if self._ahead else self._received
        for newer in self._versions(self.block):
            if newest < newer <= version:
                assert self.place.upstream is not None
                self._ahead.append((newer, self.inputs.home.hold(self.place.upstream.receive())))

    def record(self, rows_B: Tensor, output_BTD: Tensor) -> None:
        """Keep what a training pass gave."""
        if self._outputs is not None:
            rows_B = rows_B.to(self._outputs.device)
            self._outputs[rows_B] = output_BTD.to(self._outputs)
            self._rows.append(rows_B)

    def end_epoch(self, epoch: int) -> None:
        """Pass it on; what the last epoch gave is not wanted, but what the fused block gives."""
        if self._outputs is not None and epoch in self._wanted():  # not what a second attempt gives once more
            assert self.place.downstream is not None
            self._on_their_way.append(self.place.downstream.send(self._outputs))
            self._given, self._outputs, self._rows = epoch, None, []

    def receive_final(self) -> None:
        """Even where training ended before its last epoch."""
        self._receive(self.schedule.final)

    def send_final(self, outputs_NTD: Tensor) -> None:
        """In the place of every version that is still wanted: of a block that failed to learn, of several."""
        for version in self._wanted():
            assert self.place.downstream is not None
            self.place.downstream.send(outputs_NTD)
            self._given = version

    def front(self, epoch: int, due: bool) -> tuple[str, str] | None:
        """Whether the block at hand saves itself in this epoch.

        The first process calls a front when one is due, for a time that none has reached yet. Then every block saves
        itself behind the first step of that epoch, when no message is on its way.

        Args:
            epoch: The epoch, of which one step is done.
            due: Whether a front is to be called.

        Returns:
            If so: a name for the checkpoint, and that of an older one which it makes superfluous, or "/". The last
            two are kept, as other blocks may not have reached this front yet.
        """
        now = self.schedule.start(self.block) + epoch
        if due and self.ranks.leads and self._called <= now:
            self._called = now + self.stages + 1
            self.ranks.announce(f"front/{self._called}")
        if not self.ranks.heard(f"front/{now}"):
            return None
        if self.block > self.run.start:  # a block may use its final inputs later than they are given
            self._take(min(now - 1 - self.schedule.start(self.block - 1), self.schedule.final))
        name = front_name(self.schedule, self.place.members, now, self.block, self.place.member)
        self._fronts.append(name)
        return name, self._fronts.popleft() if len(self._fronts) > 2 else "/"

    def state_dict(self) -> dict[str, Any]:
        """Of a block that learns: its inputs, and what was kept of its outputs."""
        rows = torch.cat(self._rows) if self._rows else None
        return {
            "received": self._received,
            "given": self._given,
            "inputs": self.inputs.q,
            "ahead": self._ahead,
            "rows": rows,
            "outputs": None if rows is None or self._outputs is None else self._outputs[rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._received, self._given = state["received"], state["given"]
        self.inputs.q = self.inputs.home.hold(state["inputs"])
        self._ahead = [(version, self.inputs.home.hold(inputs)) for version, inputs in state["ahead"]]
        if state["rows"] is not None:
            self._outputs = self.inputs.home.empty_like(self.inputs.q)
            self.record(state["rows"], state["outputs"])
