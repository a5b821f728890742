"""Which block learns when, if blocks that follow each other learn at the same time."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Schedule:
    """A wavefront of `stages` processes over the blocks; time is counted in epochs.

    A block begins an epoch behind its predecessor, and where its stage is free: start(b) = max(start(b−1) + 1,
    start(b−K) + E). Its epoch e then trains on the newest version of its inputs that is sure to be there, which the
    predecessor gave during its epoch start(b) − start(b−1) − 1 + e; its last epoch on what the fused predecessor gives.
    So the last epoch of every block sees what the quantized model will really feed it. No other epoch waits for that,
    even where it could have it: blocks would stand in line. With one stage it is there anyway, for all epochs.

    Args:
        first: The first block; those before it are finished.
        end: Number of blocks of the model.
        stages: Processes, or groups of them, that take turns at the blocks (K).
        epochs: Epochs of every block (E).
    """

    first: int
    end: int
    stages: int
    epochs: int

    def stage_of(self, block: int) -> int:
        """Who calibrates a block."""
        return (block - self.first) % self.stages

    def blocks_of(self, stage: int) -> range:
        """What a stage calibrates, in order."""
        return range(self.first + stage, self.end, self.stages)

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for place in range(1, self.end - self.first):
            free = starts[place - self.stages] + self.epochs if place >= self.stages else 0
            starts.append(max(starts[-1] + 1, free))
        return starts

    def start(self, block: int) -> int:
        """When a block begins."""
        return self._starts[block - self.first]

    @property
    def length(self) -> int:
        """When the last block ends."""
        return self.start(self.end - 1) + self.epochs

    @property
    def final(self) -> int:
        """The version that the fused block gives."""
        return self.epochs - 1

    def version(self, block: int, epoch: int) -> int:
        """Which version of its predecessor's outputs a block trains on in an epoch."""
        if block == self.first or self.stages == 1 or epoch == self.epochs - 1:
            return self.final
        return min(self.start(block) - self.start(block - 1) - 1 + epoch, self.final - 1)

    def versions(self, block: int, since: int = 0) -> list[int]:
        """The versions that reach a block, in order; of them those that are given at time `since` or later."""
        wanted = {self.version(block, epoch) for epoch in range(self.epochs)} if block > self.first else set()
        return sorted(version for version in wanted if self.start(block - 1) + version >= since)

    def learning_at(self, time: int) -> list[int]:
        """The blocks that are in the middle of training at a time."""
        return [b for b in range(self.first, self.end) if self.start(b) <= time < self.start(b) + self.epochs]

    def finished_at(self, time: int) -> int:
        """How many blocks of the model are finished at a time."""
        return self.first + sum(self.start(b) + self.epochs <= time for b in range(self.first, self.end))
