"""Calibration of one block as a LightningModule: its parameters are Θ (paper §4.4, Algorithm A1, lines 7-14)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from bisup_lightning.model.block import is_clip, theta_parameters
from bisup_lightning.model.blockwise import Positions, run_layer
from bisup_lightning.model.kv import BlockKV

MIN_CLIP = 1e-2  # a clip value is positive: it scales Δ


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
        if is_clip(parameter_name):
            return self.clip_lr
        return self.smoothing_lr if parameter_name.endswith("smoothing") else self.low_rank_lr


class BlockCalibration(LightningModule):
    """Moves a quantized block's output on x_q towards the full-precision block's output on x_fp (eq. 8).

    Args:
        layer: A quantized layer with Θ.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        optimization: Optimizer and schedule.
        lr_scale: Factor on every learning rate.
    """

    def __init__(
        self, layer: nn.Module, positions: Positions, kv: BlockKV, optimization: Optimization, lr_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.layer = layer
        self.positions, self.kv = positions, kv
        self.optimization, self.lr_scale = optimization, lr_scale

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean square error in float32 of one batch (x_q, target), [B, T, D] each."""
        x_BTD, target_BTD = batch
        y_BTD = run_layer(self.layer, x_BTD, self.positions, self.kv)
        loss = F.mse_loss(y_BTD.float(), target_BTD.float())
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x_BTD))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the clip values positive."""
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                if is_clip(name):
                    parameter.clamp_(min=MIN_CLIP)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with one parameter group for each kind of tensor in Θ."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in theta_parameters(self.layer).items():
            decay = self.optimization.weight_decay if "low_rank" in name else 0.0
            groups.setdefault((self.optimization.rate(name) * self.lr_scale, decay), []).append(parameter)
        # Block losses can be as small as 1e-7: Adam's usual eps would then outweigh the gradients.
        optimizer = torch.optim.AdamW(
            [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()],
            eps=1e-12,
            fused=self.device.type == "cuda",
        )
        if self.optimization.schedule == "constant":
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
