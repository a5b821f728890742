"""How a block is quantized: every solver takes a block at its start and gives it back fused."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from bisup_lightning.calibrate.block_calibration import BlockCalibration, Optimization
from bisup_lightning.calibrate.captured_step import CapturedStep
from bisup_lightning.calibrate.run_reader import Partial, RunReader
from bisup_lightning.calibrate.wavefront import Relay
from bisup_lightning.data.datamodule import BlockBatches, BlockDataModule
from bisup_lightning.data.layer_inputs import Forward, LayerInputs
from bisup_lightning.errors import UserError
from bisup_lightning.model.block import fuse_layer, is_fused, quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, Positions, run_layer, run_layer_fast
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.model.linear import PackedLinear, PackedSegment, QuantLinear
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.model.theta import Theta, add_theta, draw_low_rank, theta_parameters
from bisup_lightning.quant import gptq
from bisup_lightning.quant.gptq import accumulate_hessian
from bisup_lightning.quant.spec import Scheme

ATTEMPTS = 2  # at training a block before it keeps its start


@dataclass
class Block:
    """One block of the walk and all that solving it needs.

    Args:
        index: Its place in the model.
        model: The full-precision model.
        tensors: Its full-precision tensors, on the device.
        scheme: The quantizers.
        activation_clip: Start of the activations' clip values.
        inputs: The streams, with x_fp already advanced to the target.
        batch_size: Sequences in a training batch.
        positions: Where the tokens stand.
        kv: Prompt in front, the rest quantized.
        statistics: Figures of the full-precision block's linear inputs.
        orders: Order of the channels of each linear input, by its name, where the transform has one.
        seed: Seed of all that is drawn for this block.
        make_trainer: Makes a fresh Trainer for a number of epochs.
        relay: Where its inputs come from.
        partial: Where an interrupted training of this block stopped, if it was saved.
        frugal: Whether training saves memory at the cost of a second forward pass.
        quantized: What `start` gives copies of, once it was made.
    """

    index: int
    model: BlockwiseModel
    tensors: Mapping[str, Tensor]
    scheme: Scheme
    activation_clip: float
    inputs: LayerInputs
    batch_size: int
    positions: Positions
    kv: BlockKV
    statistics: InputStatistics
    orders: Mapping[str, Tensor]
    seed: int
    make_trainer: Callable[[int], Trainer]
    relay: Relay
    partial: Partial | None = None
    frugal: bool = False
    quantized: nn.Module | None = None

    def start(self) -> nn.Module:
        """The block with rounding and grid-searched clips, where every solver starts; frozen weights are shared."""
        if self.quantized is None:
            layer = self.model.layer(self.index, self.tensors)
            config, storage = self.model.family.config, self.model.storage_dtype
            self.quantized = quantize_layer(layer, self.scheme, config, self.activation_clip, storage, self.orders)
        shared = {id(buffer): buffer for buffer in self.quantized.buffers()}
        return copy.deepcopy(self.quantized, shared)

    def run(self, layer: nn.Module) -> Forward:
        """The block's forward pass on a batch of hidden states."""
        return lambda hidden_BTD: run_layer_fast(layer, hidden_BTD, self.positions, self.kv)


@dataclass(frozen=True)
class Solution:
    """A fused block.

    Args:
        layer: The block.
        theta: What was learned of it, by name, on the host; None from a solver that learns nothing or does not keep it.
    """

    layer: nn.Module
    theta: Mapping[str, Tensor] | None = None


class Solver(ABC):
    """Quantizes one block after another.

    Args:
        activation_clip: Clip value c of every activation, or where the learned ones start (paper: 0.9).
    """

    def __init__(self, activation_clip: float = 0.9) -> None:
        if not 0 < activation_clip <= 1:
            raise ValueError(f"solver.activation_clip must lie in (0, 1], not {activation_clip}")
        self.activation_clip = activation_clip

    needs_statistics = False  # of at least as many tokens as the widest linear input has channels
    learns = False  # whether `solve` trains for epochs; then the walk reads no figure back from the device before it
    epochs = 1  # passes over the text
    fp_epochs = 0  # the first of them, which don't need what the quantized blocks before give
    theta_from: Path | None = None  # the run whose Θ it goes on from

    def start(self, block: Block) -> Solution:
        """What a solution must be better than: rounding with grid-searched clips."""
        return Solution(fuse_layer(block.start()))

    @abstractmethod
    def solve(self, block: Block, run_fused: Callable[[nn.Module], None]) -> Solution | None:
        """The fused block, or None where nothing better than the start was found.

        Args:
            block: At its start.
            run_fused: Takes the text through a fused block. A solver may call it as soon as there is one, so that the
                device has something to compute while the host reads figures of the training.
        """

    def prepare(self, model: BlockwiseModel, index: int, seed: int) -> None:  # noqa: B027  some need nothing
        """Do what a block to come needs of the host alone, while the device is busy with another."""

    def let_go(self) -> bool:
        """Free memory that is held from block to block for speed alone; whether there was any."""
        return False


class RTN(Solver):
    """Rounding to nearest with grid-searched weight clips: the baseline (paper §5.1)."""

    def solve(self, block: Block, run_fused: Callable[[nn.Module], None]) -> Solution | None:
        """None: the start is the solution."""
        return None


class BiSup(Solver):
    """Quantization-aware parameter-efficient fine-tuning of Θ (paper §4.4, Algorithm A1).

    Args:
        theta: What is learned.
        optimization: How.
        epochs: Passes over the calibration data (paper: 5).
        fp_epochs: How many epochs, from the first on, a block learns on full-precision inputs, as if no other were
            quantized; in the rest it learns on what the quantized blocks before it give (paper: 0). None: 0, but in a
            wavefront all epochs save the last.
        activation_clip: Where the activations' learned clip values start (paper: 0.9).
        keep_theta: Keep each block's Θ in run_dir, for another run to go on from.
        theta_from: A finished run that kept its Θ: each block starts there instead of at rounding. So blocks that
            learned independently can see each other's errors in an epoch more.
    """

    learns = True

    def __init__(
        self,
        theta: Theta = Theta(),  # noqa: B008  both are frozen
        optimization: Optimization = Optimization(),  # noqa: B008
        epochs: int = 5,
        fp_epochs: int | None = None,
        activation_clip: float = 0.9,
        keep_theta: bool = False,
        theta_from: Path | None = None,
    ) -> None:
        super().__init__(activation_clip)
        if epochs < 1:
            raise ValueError(f"solver.epochs must be at least 1, not {epochs}")
        if not 0 <= (fp_epochs or 0) < epochs:
            raise ValueError(f"solver.fp_epochs must be 0 or more and fewer than the {epochs} epochs, not {fp_epochs}")
        self.theta, self.optimization, self.epochs, self.fp_epochs = theta, optimization, epochs, fp_epochs or 0
        self.keep_theta, self.theta_from = keep_theta, theta_from
        self._captured: CapturedStep | None = None  # by the last block that was trained
        self._training: BlockCalibration | None = None  # the one under way
        self._drawn: tuple[int, list[tuple[Tensor, Tensor]]] | None = None  # by which seed, and what

    def start(self, block: Block) -> Solution:
        """The Θ of the run that this one goes on from, if there is one; else rounding."""
        if self.theta_from is None:
            return super().start(block)
        layer = self._learnable(block)
        theta = on_host(theta_parameters(layer)) if self.keep_theta else None
        return Solution(fuse_layer(layer), theta)

    def solve(self, block: Block, run_fused: Callable[[nn.Module], None]) -> Solution | None:
        """Learn Θ; once more at a tenth of the learning rate if the loss is not finite; give up after that."""
        for attempt in range(block.partial.attempt if block.partial else 0, ATTEMPTS):
            layer, theta, loss = self._train(block, attempt, run_fused)
            if math.isfinite(loss):
                kept = on_host(theta) if self.keep_theta else None
                return Solution(layer if is_fused(layer) else fuse_layer(layer), kept)  # if no Fuse callback fused it
        return None

    def _train(
        self, block: Block, attempt: int, run_fused: Callable[[nn.Module], None]
    ) -> tuple[nn.Module, Mapping[str, Tensor], float]:
        """A trained block, its Θ, and its last epoch's mean loss; what does not fit is trained in micro-batches."""
        saved = block.partial.path if block.partial and block.partial.attempt == attempt else None
        while True:
            layer = self._learnable(block)
            micro_batch = min(block.batch_size, block.inputs.micro_batch)
            batches = BlockBatches(
                block.inputs, block.batch_size, block.seed, self.fp_epochs, block.relay.receive_final
            )
            steps = self.epochs * len(batches)
            module = BlockCalibration(
                layer, block.positions, block.kv, self.optimization, steps, attempt, micro_batch,
                share=block.inputs.share, frugal=block.frugal, captured=self._captured, run_fused=run_fused,
            )  # fmt: skip
            self._captured, self._training = None, module
            trainer, out_of_memory = block.make_trainer(self.epochs), None
            try:
                trainer.fit(module, BlockDataModule(batches), ckpt_path=saved, weights_only=True)
            except torch.OutOfMemoryError as error:
                out_of_memory = error.with_traceback(None)  # which would keep the failed step's tensors alive
                module.captured = None
            self._training = None
            layer, theta, captured = module.release()
            trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []  # or it would keep them as long
            if out_of_memory is None:
                self._captured = captured
                return layer, theta, trainer.callback_metrics["loss"].item()
            del layer, theta, module, batches, trainer
            if block.inputs.share.members > 1:  # the others wait for this one's gradients
                raise UserError(
                    "data.batch_size: training ran out of device memory, and processes that share a batch can't go on "
                    "by halves; give a smaller data.batch_size or data.seq_len"
                ) from out_of_memory
            block.inputs.halve(out_of_memory)
            if saved is not None and not saved.exists():  # a newer one has taken its place
                saved = None

    def let_go(self) -> bool:
        """Free the captured step, also that of a training which has just ended."""
        held, self._captured = self._captured is not None, None
        if self._training is not None:
            held, self._training.captured = held or self._training.captured is not None, None
        if held:
            torch.cuda.empty_cache()
        return held

    def prepare(self, model: BlockwiseModel, index: int, seed: int) -> None:
        """Draw A and B, where no other run's take their place."""
        if self.theta_from is not None:
            return
        shapes = model.family.layer_shapes(index)
        weights = (shapes[f"{name}.weight"] for entry in LINEAR_INPUTS for name in entry.linears)
        generator = torch.Generator().manual_seed(seed)
        self._drawn = seed, draw_low_rank(weights, self.theta, generator, model.device.type == "cuda")

    def _learnable(self, block: Block) -> nn.Module:
        """The block with its Θ where learning begins."""
        layer, drawn = block.start(), None
        if self._drawn is not None and self._drawn[0] == block.seed:
            drawn, self._drawn = self._drawn[1], None  # on a CPU they are what learns
        generator = torch.Generator().manual_seed(block.seed)
        add_theta(layer, self.theta, generator, block.statistics.absmax, drawn)
        if self.theta_from is not None:
            learned = RunReader(self.theta_from).read_theta(block.index) or {}
            theta = theta_parameters(layer)
            for name, tensor in learned.items():
                theta[name].data.copy_(tensor)
        return layer


def on_host(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the host."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in theta.items()}


class GPTQ(Solver):
    """Rounds a weight column by column and makes up for each error in the columns that follow (arXiv 2210.17323).

    The Hessian of each linear comes from the block's real inputs x_q, quantized as they will be, behind the linears of
    the block that are already solved. Weight clips are grid-searched.

    Args:
        damp: Share of the Hessian's mean diagonal added to it; raised where it is singular all the same.
        blocksize: Columns whose errors are carried on together.
        act_order: Walk the columns by falling Hessian diagonal; scales of groups are then set beforehand.
        activation_clip: Clip value c of every activation (paper: 0.9).
    """

    needs_statistics = True

    def __init__(
        self, damp: float = 0.01, blocksize: int = 128, act_order: bool = False, activation_clip: float = 0.9
    ) -> None:
        super().__init__(activation_clip)
        if not 0 < damp <= 1 or blocksize < 1:
            raise ValueError(f"solver.damp must lie in (0, 1] and solver.blocksize above 0, not {damp}, {blocksize}")
        self.damp, self.blocksize, self.act_order = damp, blocksize, act_order

    @torch.no_grad()
    def solve(self, block: Block, run_fused: Callable[[nn.Module], None]) -> Solution | None:
        """Solve the linears of one input after those of the other, in the order in which the block computes them."""
        layer = block.start()
        unsolved: dict[str, QuantLinear] = {}
        for name in (name for entry in LINEAR_INPUTS for name in entry.linears):
            linear = layer.get_submodule(name)
            assert isinstance(linear, QuantLinear)
            unsolved[name] = linear
            layer.set_submodule(name, linear.unquantized())  # until solved, it computes with the weight as it is
        for entry in LINEAR_INPUTS:
            hessian_II = self._hessian(block, layer, unsolved[entry.linears[0]].input_quantizer)
            for name in entry.linears:
                layer.set_submodule(name, self._solve_linear(unsolved[name], hessian_II))
        return Solution(fuse_layer(layer))

    def _hessian(self, block: Block, layer: nn.Module, quantizer: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        hessian: list[Tensor] = []
        handle = quantizer.register_forward_hook(lambda module, arguments, x_BTI: seen.append(x_BTI))

        def run(hidden_BTD: Tensor) -> Tensor:
            seen.clear()
            output_BTD = run_layer(layer, hidden_BTD, block.positions, block.kv)  # eagerly: it is watched by a hook
            x_TI = seen[0].flatten(0, -2).float()
            if not hessian:
                hessian.append(x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1]))
            accumulate_hessian(hessian[0], x_TI)  # last: a pass that runs out of memory is taken again
            return output_BTD

        block.inputs.for_each_q(run)
        handle.remove()
        block.inputs.share.sum_(hessian)
        return hessian[0]

    def _solve_linear(self, linear: QuantLinear, hessian_II: Tensor) -> PackedLinear:
        segments = [
            gptq.ClippedSegment(segment.columns, segment.spec, None if segment.spec is None else clip)
            for segment, clip in zip(linear.segments, linear.clips, strict=True)
        ]
        solved = gptq.gptq_quantize(
            linear.weight.float(), hessian_II, segments, blocksize=self.blocksize, damp=self.damp,
            act_order=self.act_order, scale_dtype=linear.storage_dtype,
        )  # fmt: skip
        packed = [
            PackedSegment.of_values(part.codes, linear.storage_dtype)
            if segment.spec is None or part.scale_OG is None
            else PackedSegment.of_codes(part.codes, part.scale_OG, segment.spec)
            for part, segment in zip(solved, linear.segments, strict=True)
        ]
        return PackedLinear(packed, linear.bias, linear.input_quantizer)
