"""What is done is saved, so that an interrupted run loses minutes at most."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.wavefront import Relay


class BlockCheckpoint(WalkCallback):
    """Saves each finished block, the training at hand from time to time and when a signal asks the run to end.

    Args:
        every_n_seconds: How often Θ, optimizer and loader are saved inside a block.
        streams_every_n_seconds: How often the streams are saved behind a block. They are large, and resuming finds them
            again by forward passes through the finished blocks, about a tenth of the time that these took.
    """

    saves_blocks = True

    def __init__(self, every_n_seconds: float = 60.0, streams_every_n_seconds: float = 600.0) -> None:
        for name, seconds in {"every": every_n_seconds, "streams_every": streams_every_n_seconds}.items():
            if not seconds >= 0:
                raise ValueError(f"trainer.callbacks: {name}_n_seconds must be 0 or more, not {seconds}")
        self.every_n_seconds, self.streams_every_n_seconds = every_n_seconds, streams_every_n_seconds

    def on_walk_start(self, walk: BlockWalk) -> None:
        """Start the clocks."""
        self.walk, self.index = walk, 0
        self.saved_at = self.streams_saved_at = time.monotonic()
        self.parted = False  # whether the training was saved because of a signal

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        """Remember which block it is."""
        self.index = index

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits for the end of a step, or behind the last one for the end of the block."""
        self.walk.signals.defer()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Save the training if it is time or a signal came, which then ends the run.

        Not behind the last batch of an epoch: a Trainer that resumed there would lose count of the next one. Of several
        processes that train a block together, the first saves it.
        """
        if trainer.is_last_batch:
            return
        assert isinstance(pl_module, BlockCalibration)
        signals, now = self.walk.signals, time.monotonic()
        parting = signals.received is not None and not self.parted
        if parting or now - self.saved_at >= self.every_n_seconds:
            if not self.walk.share.member:
                step = trainer.global_step
                self.walk.writer.save_partial(self.index, pl_module.attempt, step, trainer.save_checkpoint)
            self.saved_at, self.parted = now, signals.received is not None
        signals.check()

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """Save the block, beside what follows."""
        due = time.monotonic() - self.streams_saved_at >= self.streams_every_n_seconds
        plain = type(walk.relay) is Relay
        streams = walk.whole_streams() if plain and walk.share.agree(due, walk.model.device) else None
        if not walk.share.member:
            walk.writer.save_block(result.index, result.tensors, result.metrics(), streams, result.theta)
        self.saved_at = time.monotonic()
        if streams is not None:
            self.streams_saved_at = self.saved_at
