"""What the walk gives for a finished block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BlockResult:
    """A finished block.

    Args:
        index: Its place in the model.
        tensors: What the artifact holds of it, by full name: packed weights, clips, norms, the prompt's K and V.
        loss_initial: Mean square error of the start (rounding with grid-searched clips).
        loss_final: Mean square error of the fused block.
        relative_mse: `loss_final` over the mean square of the full-precision output.
        kept_start: Whether learning found nothing better than the start.
        micro_batch: Sequences that were computed at a time; fewer than in a batch where the device ran out of memory.
        stages: How many blocks were learned at the same time.
        phases: Seconds that each part of the work took, in order.
        theta: What was learned, on the host, if the solver keeps it.
    """

    index: int
    tensors: Mapping[str, Tensor]
    loss_initial: float
    loss_final: float
    relative_mse: float
    kept_start: bool
    micro_batch: int
    stages: int
    phases: Mapping[str, float]
    theta: Mapping[str, Tensor] | None = None

    @property
    def seconds(self) -> float:
        """Time from reading the block to both streams standing behind it."""
        return sum(self.phases.values())

    def metrics(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {
            "index": self.index,
            "loss_initial": self.loss_initial,
            "loss_final": self.loss_final,
            "mse": self.loss_final,
            "relative_mse": self.relative_mse,
            "kept_start": self.kept_start,
            "micro_batch": self.micro_batch,
            "stages": self.stages,
            "seconds": self.seconds,
            "phases": dict(self.phases),
        }
