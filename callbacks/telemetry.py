"""How fast a block learns, at which rate, in how much memory."""

import torch
from lightning.pytorch import LightningModule, Trainer

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.budget import GIB
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.stopwatch import Stopwatch
from bisup_lightning.model.theta import theta_kind


class Telemetry(WalkCallback):
    """Logs once an epoch, to CSV and TensorBoard beside the loss.

    `learning_rate/clip`, `/smoothing` and `/low_rank` as the epoch begins; `tokens_per_second` through forward,
    backward and step; on a GPU `device_memory_gib`, the most that PyTorch held so far.
    """

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        """Note how many tokens an epoch sees, and where."""
        self.tokens, self.device = walk.inputs.num_tokens, walk.model.device
        self.clock: Stopwatch | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.rates = {
            theta_kind(names[id(parameter)]): group["lr"]
            for group in trainer.optimizers[0].param_groups
            for parameter in group["params"]
        }
        self.clock = Stopwatch(self.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; the device is not waited for."""
        assert isinstance(pl_module, BlockCalibration)
        if self.clock is None:  # a resumed run ends this epoch, but did not begin it
            return
        clock, tokens = self.clock, self.tokens
        clock.lap("epoch")
        pl_module.epoch_log.add({f"learning_rate/{kind}": float(rate) for kind, rate in self.rates.items()})
        pl_module.epoch_log.add({"tokens_per_second": lambda: tokens / clock.laps["epoch"]})
        if self.device.type == "cuda":
            pl_module.epoch_log.add({"device_memory_gib": torch.cuda.max_memory_allocated(self.device) / GIB})
