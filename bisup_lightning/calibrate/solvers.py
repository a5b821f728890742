"""How a block is quantized: every solver takes a block at its start and returns it fused."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from bisup_lightning.calibrate.block_calibration import BlockCalibration, Optimization
from bisup_lightning.data.datamodule import BlockDataModule
from bisup_lightning.data.layer_inputs import LayerInputs, Run
from bisup_lightning.model.block import Theta, add_theta, fuse_layer, is_fused, quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, Positions, run_layer
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.quant.spec import Precision


@dataclass
class Block:
    """One block of the walk and all that solving it needs.

    Args:
        index: Its place in the model.
        model: The full-precision model.
        tensors: Its full-precision tensors, on the device.
        precision: The quantizers.
        activation_clip: Start of the activations' clip values.
        inputs: The streams, with x_fp already advanced to the target.
        batch_size: Sequences in a training batch.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        absmax: Largest magnitude of each channel of each norm's full-precision output, by the norm's name.
        seed: Seed of all that is drawn for this block.
        make_trainer: Makes a fresh Trainer for a number of epochs.
    """

    index: int
    model: BlockwiseModel
    tensors: Mapping[str, Tensor]
    precision: Precision
    activation_clip: float
    inputs: LayerInputs
    batch_size: int
    positions: Positions
    kv: BlockKV
    absmax: Mapping[str, Tensor]
    seed: int
    make_trainer: Callable[[int], Trainer]

    def start(self) -> nn.Module:
        """The block with rounding and grid-searched clips: where every solver starts."""
        assert self.model.storage_dtype is not None
        layer = self.model.layer(self.index, self.tensors)
        return quantize_layer(layer, self.precision, self.activation_clip, self.model.storage_dtype)

    def run(self, layer: nn.Module) -> Run:
        """The block's forward pass on a batch of hidden states."""
        return lambda hidden_BTD: run_layer(layer, hidden_BTD, self.positions, self.kv)


class Solver(ABC):
    """Quantizes one block after another.

    Args:
        activation_clip: Clip value c of every activation, or where the learned ones start (paper: 0.9).
    """

    def __init__(self, activation_clip: float = 0.9) -> None:
        if not 0 < activation_clip <= 1:
            raise ValueError(f"solver.activation_clip must lie in (0, 1], not {activation_clip}")
        self.activation_clip = activation_clip

    @abstractmethod
    def solve(self, block: Block) -> nn.Module | None:
        """The fused block, or None where nothing better than the start was found."""


class RTN(Solver):
    """Rounding to nearest with grid-searched weight clips: the baseline (paper §5.1)."""

    def solve(self, block: Block) -> nn.Module | None:
        """The start is the solution."""
        return None


class BiSup(Solver):
    """Quantization-aware parameter-efficient fine-tuning of Θ (paper §4.4, Algorithm A1).

    Args:
        theta: What is learned.
        optimization: How.
        epochs: Passes over the calibration data (paper: 5).
        activation_clip: Where the activations' learned clip values start (paper: 0.9).
    """

    def __init__(
        self,
        theta: Theta = Theta(),  # noqa: B008  both are frozen
        optimization: Optimization = Optimization(),  # noqa: B008
        epochs: int = 5,
        activation_clip: float = 0.9,
    ) -> None:
        super().__init__(activation_clip)
        if epochs < 1:
            raise ValueError(f"solver.epochs must be at least 1, not {epochs}")
        self.theta, self.optimization, self.epochs = theta, optimization, epochs

    def solve(self, block: Block) -> nn.Module | None:
        """Learn Θ; once more at a tenth of the learning rate if the loss is not finite; give up after that."""
        for lr_scale in (1.0, 0.1):
            layer = block.start()
            generator = torch.Generator().manual_seed(block.seed)
            add_theta(layer, self.theta, generator, block.absmax)
            module = BlockCalibration(layer, block.positions, block.kv, self.optimization, lr_scale)
            trainer = block.make_trainer(self.epochs)
            trainer.fit(module, BlockDataModule(block.inputs, block.batch_size, block.seed))
            if math.isfinite(trainer.callback_metrics["loss"].item()):
                if not is_fused(module.layer):  # without the Fuse callback
                    fuse_layer(module.layer)
                return module.layer.to(block.model.device)
        return None
