"""What becomes of Θ while a block learns."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.model.theta import theta_by_kind


class ThetaStatistics(WalkCallback):
    """Logs smallest, mean and largest value of each kind of learned tensor behind the last epoch: `theta/s1/max`, ….

    Kinds are `weight_clip`, `activation_clip`, `s1`, `s2` and `low_rank` (the product AB); paper §4.1 to §4.3.
    """

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; before the block is fused, which leaves nothing of Θ. Products AB take as long as a few steps."""
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            return
        assert isinstance(pl_module, BlockCalibration)
        for kind, tensors in theta_by_kind(pl_module.layer).items():
            pl_module.epoch_log.add({f"theta/{kind}/{name}": value for name, value in _summary(tensors).items()})


def _summary(tensors: list[Tensor]) -> dict[str, Tensor]:
    count = sum(tensor.numel() for tensor in tensors)
    return {
        "min": torch.stack([tensor.amin() for tensor in tensors]).amin(),
        "mean": torch.stack([tensor.sum() for tensor in tensors]).sum() / count,
        "max": torch.stack([tensor.amax() for tensor in tensors]).amax(),
    }
