"""What a callback of the walk can hear: Lightning's own events inside a block, and these between blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback

if TYPE_CHECKING:
    from bisup_lightning.calibrate.block_result import BlockResult
    from bisup_lightning.calibrate.driver import BlockWalk


class WalkCallback(Callback):
    """A Lightning callback that also hears of the walk over the blocks."""

    saves_blocks = False  # whether finished blocks reach the run directory through this callback

    def compute_dtype(self, device: torch.device) -> torch.dtype | None:
        """What blocks and streams are in on a device while they are calibrated, if this callback sees to it."""
        return None

    def on_walk_start(self, walk: BlockWalk) -> None:
        """Before the streams are made or read."""

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        """Before a block is read."""

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """When a block is fused and both streams stand behind it."""

    def on_walk_end(self, walk: BlockWalk) -> None:
        """When the walk ends, with the last block or with an error."""
