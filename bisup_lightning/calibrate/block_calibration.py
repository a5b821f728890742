"""Calibration of one block as a LightningModule: its parameters are Θ (paper §4.4, Algorithm A1, lines 7-14)."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from bisup_lightning.calibrate.captured_step import CapturedStep, Gradients, can_capture, leaves_room, with_gradients
from bisup_lightning.calibrate.epoch_log import EpochLog
from bisup_lightning.data.share import WHOLE, Share
from bisup_lightning.model.block import is_fused, learn_by_codes
from bisup_lightning.model.blockwise import Positions, run_layer, run_layer_in_halves
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.model.linear import QuantLinear
from bisup_lightning.model.theta import theta_kind, theta_parameters
from bisup_lightning.quant.compiled import compiled_on_gpu

MIN_CLIP = 1e-2  # a clip value is positive: it scales Δ
EAGER_STEPS = 2  # before the one that is captured: the first compiles, and capturing takes as long as both compute


@dataclass(frozen=True)
class Optimization:
    """AdamW over the tensors of Θ. The paper's setting is a constant 5e-3 for all (configs/paper/optimization.yaml).

    Args:
        clip_lr: Learning rate of the clip values.
        smoothing_lr: Learning rate of the smoothing vectors.
        low_rank_lr: Learning rate of the low-rank matrices.
        weight_decay: Decoupled weight decay of the low-rank matrices; the others have none.
        schedule: `cosine` to zero over the block's steps, or `constant`.
    """

    clip_lr: float = 1e-2
    smoothing_lr: float = 2e-2
    low_rank_lr: float = 1e-2
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("clip_lr", "smoothing_lr", "low_rank_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"solver.optimization.{name} must be 0 or more, not {getattr(self, name)}")

    def rate(self, parameter_name: str) -> float:
        """The learning rate of a tensor of Θ, by its name in the block."""
        rates = {"clip": self.clip_lr, "smoothing": self.smoothing_lr, "low_rank": self.low_rank_lr}
        return rates[theta_kind(parameter_name)]

    def decay(self, parameter_name: str) -> float:
        """Its weight decay."""
        return self.weight_decay if theta_kind(parameter_name) == "low_rank" else 0.0


@compiled_on_gpu(dynamic=False)
def block_loss(layer: nn.Module, x_BTD: Tensor, target_BTD: Tensor, positions: Positions, kv: BlockKV) -> Tensor:
    """Mean square distance of a block's output to the target (eq. 8), in float32."""
    return F.mse_loss(run_layer(layer, x_BTD, positions, kv).float(), target_BTD.float())


def frugal_block_loss(layer: nn.Module, x_BTD: Tensor, target_BTD: Tensor, positions: Positions, kv: BlockKV) -> Tensor:
    """The same, with the activations of half a block computed anew for the backward pass instead of kept."""
    return F.mse_loss(run_layer_in_halves(layer, x_BTD, positions, kv).float(), target_BTD.float())


class BlockCalibration(LightningModule):
    """Moves a quantized block's output on x_q towards the full-precision block's output on x_fp (eq. 8).

    Args:
        layer: A quantized layer with Θ.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        optimization: Optimizer and schedule.
        steps: Optimizer steps in all. The Trainer's own estimate won't do: asking for it sets the loader up before a
            checkpoint could tell it where to go on.
        attempt: Which try this is: a first one, or one at a tenth of every learning rate after that diverged.
        micro_batch: Sequences to compute at a time; gradients add up over a batch. None for the whole batch.
        share: The processes that train this block together, each on its part of every batch.
        frugal: Whether to save memory at the cost of a second forward pass.
        captured: The step that was captured for another block; it is replayed for this one too if it fits.
        run_fused: Called with the layer when training ends, if a callback has fused it.
    """

    def __init__(
        self,
        layer: nn.Module,
        positions: Positions,
        kv: BlockKV,
        optimization: Optimization,
        steps: int,
        attempt: int = 0,
        micro_batch: int | None = None,
        share: Share = WHOLE,
        frugal: bool = False,
        captured: CapturedStep | None = None,
        run_fused: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.run_fused = layer, run_fused
        self.positions, self.kv = positions, kv
        self.optimization, self.steps = optimization, steps
        self.attempt, self.micro_batch = attempt, micro_batch
        self.share = share
        self.loss = frugal_block_loss if frugal else block_loss
        learn_by_codes(layer, on=not frugal)  # which need more memory
        self.theta = theta_parameters(layer)  # which fusing takes from the layer
        self.clips: list[Tensor] = [parameter for name, parameter in self.theta.items() if theta_kind(name) == "clip"]
        self.epoch_log = EpochLog()
        self.losses: tuple[Tensor | float, int] = (0.0, 0)  # their sum over the epoch so far, and of how many sequences
        self.capturing = not frugal  # on a GPU; what is captured keeps its memory
        self.captured: CapturedStep | None = None
        if self.capturing and captured is not None and captured.fits(layer, positions, kv, micro_batch):
            captured.attach(layer, kv)
            self.captured = captured
        self.steps_of: Counter[torch.Size] = Counter()  # so far, by the shape of their first micro-batch
        for module in layer.modules():
            if isinstance(module, QuantLinear):
                module.frugal = frugal

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean square error in float32 of one batch (inputs, target), or of its last micro-batch.

        The gradients of the micro-batches before that are added here, so that no more than one is ever in memory.
        Where several processes share a batch, each adds its part of the mean.
        """
        x_BTD, target_BTD = batch
        size = self.micro_batch or len(x_BTD)
        parts = list(zip(x_BTD.split(size), target_BTD.split(size), strict=True))
        self._capture(*parts[0])
        loss, total = x_BTD.new_zeros(()), x_BTD.new_zeros((), dtype=torch.float32)
        for place, (x_bTD, target_bTD) in enumerate(parts):
            loss = with_gradients(*self._step(x_bTD, target_bTD), list(self.theta.values()))
            loss = loss * (len(x_bTD) / (len(x_BTD) * self.share.members))
            total = total + loss.detach()
            if place < len(parts) - 1:
                loss.backward()
        self.batch_loss, self.batch_length = total, len(x_BTD)
        return loss

    def _step(self, x_bTD: Tensor, target_bTD: Tensor) -> tuple[Tensor, Gradients]:
        """The loss of a micro-batch and the gradients of Θ, replayed where that was captured."""
        if self.captured is not None and self.captured.matches(x_bTD) and not torch.is_anomaly_enabled():
            return self.captured(x_bTD, target_bTD)  # anomaly detection would read numbers
        return self._loss_and_gradients(self.layer, x_bTD, target_bTD, self.positions, self.kv)

    def _loss_and_gradients(
        self, layer: nn.Module, x_bTD: Tensor, target_bTD: Tensor, positions: Positions, kv: BlockKV
    ) -> tuple[Tensor, Gradients]:
        """The detached loss, a float32 scalar, and the gradients in the order of `theta_parameters`.

        A live autograd graph would keep the memory of a captured one busy.
        """
        loss = self.loss(layer, x_bTD, target_bTD, positions, kv)
        theta = list(theta_parameters(layer).values())
        return loss.detach(), torch.autograd.grad(loss, theta, allow_unused=True)

    def _capture(self, x_bTD: Tensor, target_bTD: Tensor) -> None:
        """On a GPU, capture the third step of a shape; the others replay it, and other blocks' where memory allows."""
        due = self.steps_of[x_bTD.shape] == EAGER_STEPS and not torch.is_anomaly_enabled()
        longer = self.captured is None or len(x_bTD) > self.captured.length  # than the last batch of an epoch, maybe
        if can_capture(x_bTD.device) and self.capturing and due and longer:
            if self.captured is not None:
                self.captured.detach()
                self.captured = None
            try:
                self.captured = CapturedStep(
                    self._loss_and_gradients, self.layer, self.positions, self.kv, x_bTD, target_bTD
                )
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                self.capturing = False  # a step by itself had enough, as one has run
                torch.cuda.empty_cache()
        self.steps_of[x_bTD.shape] += 1

    def make_room(self) -> None:
        """Free memory that others, and callbacks, may need: what is not in use, then the captured step's."""
        if self.captured is None or leaves_room(self.device):
            return
        torch.cuda.empty_cache()
        if not leaves_room(self.device):
            self.captured = None
            torch.cuda.empty_cache()

    def release(self) -> tuple[nn.Module, dict[str, nn.Parameter], CapturedStep | None]:
        """Give away layer, Θ and captured step when the training has ended.

        A Trainer's cycles of references keep this module until garbage is collected.
        """
        if self.captured is not None:
            self.captured.detach()
        released = self.layer, self.theta, self.captured
        self.layer, self.theta, self.clips, self.captured, self.run_fused = nn.Identity(), {}, [], None, None
        return released

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add up gradients and loss over the processes, and losses over the epoch."""
        self.share.sum_([*(p.grad for p in self.theta.values() if p.grad is not None), self.batch_loss])
        total, count = self.losses
        self.losses = total + self.batch_loss * self.batch_length, count + self.batch_length

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin with no gradients."""
        for parameter in self.theta.values():
            parameter.grad = None

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Keep, where Lightning would drop them, the gradients that `training_step` has added."""

    def optimizer_step(self, *arguments: Any, **more: Any) -> None:
        """Step, and keep the clip values positive."""
        super().optimizer_step(*arguments, **more)
        if self.clips:
            with torch.no_grad():
                torch._foreach_clamp_min_(self.clips, MIN_CLIP)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the epoch's mean loss behind its last batch; every `log` takes the host as long as a small step."""
        if self.trainer.is_last_batch:
            self._log_loss()
        if self.global_step == self.steps:
            self.make_room()

    def _log_loss(self) -> None:
        total, count = self.losses
        if count:
            self.epoch_log.add({"loss": total / count})
            self.log("loss", total / count, on_step=False, on_epoch=True, batch_size=1, logger=False)
            self.losses = 0.0, 0

    def on_train_epoch_end(self) -> None:
        """Stop once an epoch's loss is known to be NaN or inf.

        On a GPU it is known one epoch late; all processes see the same value and stop together.
        """
        self._log_loss()  # where a callback ended the training within an epoch
        self.epoch_log.end(self.current_epoch, self.global_step - 1, self.device, self.loggers)
        if self.epoch_log.diverged:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Let the device run the fused block while the loggers hear of the last epoch."""
        self.make_room()
        if self.run_fused is not None and is_fused(self.layer) and not self.epoch_log.diverged:
            with suppress(torch.OutOfMemoryError):  # then it has its turn when what training holds is free
                self.run_fused(self.layer)
        self.epoch_log.tell(self.loggers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's losses, and the random generators: nothing here draws, but a user's callback may."""
        self.epoch_log.tell(self.loggers)
        checkpoint["losses"] = self.losses
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the epoch's losses and the random generators."""
        self.losses = checkpoint["losses"]
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with as few parameter groups as there are learning rates and decays: each takes launches of its own."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.theta.items():
            rate, decay = self.optimization.rate(name) * 0.1**self.attempt, self.optimization.decay(name)
            groups.setdefault((rate, decay), []).append(parameter)
        # Block losses can be as small as 1e-7: Adam's usual eps would then outweigh the gradients.
        optimizer = torch.optim.AdamW(
            [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()],
            eps=1e-12,
            fused=self.device.type == "cuda",
        )
        if self.optimization.schedule == "constant":
            return {"optimizer": optimizer}
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
