"""Blocks compute in BF16 while they are calibrated."""

import torch

from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback


class BF16(WalkCallback):
    """Casts each block to BF16 as it is read, whose range FP16 lacks (Algorithm A1, line 5); Θ stays float32.

    The artifact is written in the checkpoint's own dtype (line 16). On a CPU, blocks compute in float32 instead.
    """

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that blocks and streams have."""
        return torch.bfloat16 if device.type == "cuda" else torch.float32

    def on_walk_start(self, walk: BlockWalk) -> None:
        """Have the model read its blocks in that dtype, and the walk hold its streams in it."""
        walk.model.dtype = self.compute_dtype(walk.model.device)
