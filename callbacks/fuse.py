"""A trained block is fused."""

from lightning.pytorch import LightningModule, Trainer

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.model.block import fuse_layer


class Fuse(WalkCallback):
    """Folds Θ into norms and integer weights when training ends (Algorithm A1, line 17)."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse while the block is still on the device."""
        assert isinstance(pl_module, BlockCalibration)
        fuse_layer(pl_module.layer)
