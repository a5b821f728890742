"""One live line for the whole walk."""

import math
import time

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.budget import GIB
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback


class WalkProgress(WalkCallback):
    """Shows block i of N, epoch, loss against its start, elapsed time, ETA and device memory.

    On a terminal the line is live, and each finished block leaves a line above it; elsewhere only those lines appear,
    behind one when the walk begins. Of several processes, the first one's line shows where all of them are.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.first: int | None = None  # block of this process

    def on_walk_start(self, walk: BlockWalk) -> None:
        """Open the line."""
        self.walk, self.num_blocks, self.device = walk, walk.model.num_layers, walk.model.device
        if not walk.ranks.leads:
            return
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        else:
            self.console.print(f"walking over {self.num_blocks} blocks")

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        """Name the block."""
        self.index, self.trained = index, False
        self.start: Tensor | float = math.nan  # in a wavefront it is not known before the block is trained
        if self.first is None:
            self.first, self.started = index, time.perf_counter()
        self._show(f"block {index + 1}/{self.num_blocks}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch, and the mean loss of the last one whose loss is known."""
        assert isinstance(pl_module, BlockCalibration)
        if not self.trained and isinstance(start := self.walk.loss_initial, Tensor):
            self.start = start.to("cpu", non_blocking=True)
        self.trained, change = True, ""
        if (loss := pl_module.epoch_log.known_loss) is not None:  # then so is the start's, which came before
            change = f" · loss {loss:.3e}"
            change += f", at the start {self.start:.3e}" if math.isfinite(self.start) else ""
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._show(f"block {self.index + 1}/{self.num_blocks} · {epoch}{change}")

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """Leave the block's line."""
        change = f"loss {result.loss_initial:.3e} → {result.loss_final:.3e} (relative {result.relative_mse:.2e})"
        kept = " · kept its start" if result.kept_start and self.trained else ""
        line = f"block {result.index + 1}/{self.num_blocks} · {change} · {result.seconds:.1f} s{kept}{self._memory()}"
        if not walk.share.member:  # the others of its stage would only repeat it
            (self.live.console if self.live else self.console).print(line)

    def on_walk_end(self, walk: BlockWalk) -> None:
        """Close the line, and give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _show(self, now: str) -> None:
        ranks, share = self.walk.ranks, self.walk.share
        if not share.member:
            ranks.tell(f"progress/{ranks.rank}", now)
        if self.live is not None and self.first is not None:
            keys = [f"progress/{rank}" for rank in range(0, ranks.world, share.members)]
            if len(keys) > 1:
                now = " | ".join(ranks.announced(key) for key in keys if ranks.heard(key))
            elapsed = time.perf_counter() - self.started
            done = self.index - self.first
            left = f" · {_clock(elapsed / done * (self.num_blocks - self.index))} left" if done else ""
            self.live.update(Text(f"{now} · {_clock(elapsed)}{left}{self._memory()}"))

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return ""
        return f" · {torch.cuda.max_memory_allocated(self.device) / GIB:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
