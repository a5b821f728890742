"""Blocks compute in BF16 while they are calibrated."""

import torch

from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback


class BF16(WalkCallback):
    """Casts each block to BF16 as it is read, whose range FP16 lacks (Algorithm A1, line 5); Θ stays float32.

    The artifact is written in the checkpoint's own dtype (line 16). On a CPU, blocks compute in float32 instead.
    """

    def on_walk_start(self, walk: BlockWalk) -> None:
        """Choose the dtype that blocks and streams have."""
        walk.model.dtype = torch.bfloat16 if walk.model.device.type == "cuda" else torch.float32
