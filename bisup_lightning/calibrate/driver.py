"""The walk over the blocks: Algorithm A1 of the paper, one block in memory at a time."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from bisup_lightning.calibrate.block_reader import BlockReader
from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.block_writer import BlockWriter
from bisup_lightning.calibrate.candidate import Candidate, keep_the_better, sample_size
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.parallel import Ranks
from bisup_lightning.calibrate.run_reader import Partial, Progress
from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.calibrate.solvers import Block, Solution, Solver
from bisup_lightning.calibrate.stopwatch import Stopwatch
from bisup_lightning.calibrate.wavefront import Relay
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.share import WHOLE, Share
from bisup_lightning.data.streams import Streams, StreamStorage, choose_place
from bisup_lightning.errors import UserError
from bisup_lightning.model.block import hold_dense, stored_tensors
from bisup_lightning.model.blockwise import PROMPT, BlockwiseModel, Positions, run_layer_fast
from bisup_lightning.model.family import layer_prefix
from bisup_lightning.model.kv import BlockKV, KeyValue, KVQuantizer, PromptKV
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.quant.spec import Scheme
from bisup_lightning.transform.transform import Transform

Memory = Literal["auto", "low"]
MakeTrainer = Callable[[int, int], Trainer]


class BlockWalk:
    """Calibrates the blocks of a model in order.

    Args:
        model: The full-precision model.
        transform: The transform that the model has undergone.
        scheme: The quantizers.
        solver: How each block is solved.
        store: Where finished blocks go.
        prompt_ids: Token ids of the high-precision prompt; may be empty.
        batch_size: Sequences in a batch.
        seed: Seed of all that is drawn.
        callbacks: What else happens, and when.
        make_trainer: Makes a fresh Trainer from a block's index and a number of epochs.
        signals: What may ask the walk to end.
        ranks: The processes that walk together.
        share: The part of the text that this one holds.
        independent: Whether blocks are calibrated on full-precision inputs, as if no other were quantized.
        memory: `low` computes one sequence at a time, keeps of a forward pass only what half a block needs for its
            gradients, and keeps the streams off the device.
        streams: Where the streams live.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        transform: Transform,
        scheme: Scheme,
        solver: Solver,
        store: RunStore,
        prompt_ids: Sequence[int],
        batch_size: int,
        seed: int,
        callbacks: Sequence[Callback],
        make_trainer: MakeTrainer,
        signals: Signals,
        ranks: Ranks = Ranks(),  # noqa: B008  frozen
        share: Share = WHOLE,
        independent: bool = False,
        memory: Memory = "auto",
        streams: Streams = "auto",
    ) -> None:
        self.model, self.transform, self.scheme = model, transform, scheme
        self.solver, self.store = solver, store
        self.batch_size, self.seed = batch_size, seed
        self.prompt_ids = list(prompt_ids)
        self.callbacks, self.make_trainer, self.signals = callbacks, make_trainer, signals
        self.ranks, self.share, self.independent = ranks, share, independent
        self.memory, self.streams = memory, streams
        self.relay = Relay()
        self.partials: Mapping[int, Partial] = {}
        self.reader, self.writer = BlockReader(model, solver.let_go), BlockWriter(store)
        self.prepared: tuple[int, Trainer] | None = None  # for which block
        self.kv_quantizer = KVQuantizer.of(scheme).prepare(model.family.head_dim, model.device)
        self.inputs: LayerInputs
        self.prompt_1PD: Tensor
        self.next_block = 0
        self.loss_initial: Tensor | float = math.nan  # of the block at hand

    def __enter__(self) -> Self:
        """Let the callbacks set up before the streams are made."""
        self._tell("on_walk_start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what runs beside the walk, and let the callbacks know."""
        self.relay.stop()
        self.reader.close()
        try:
            self._tell("on_walk_end")
            self.solver.let_go()
        finally:
            self.writer.close()

    def begin(self, tokens_NT: Tensor) -> None:
        """Begin before the first block: both streams are the embedded tokens."""
        own_NT = self.share.of(tokens_NT, self.batch_size)
        shape, dtype = torch.Size([*own_NT.shape, self.model.family.hidden_size]), self.model.dtype
        home = self.home(shape, dtype)
        on_device = home.place == "device"  # where nothing is embedded
        x_NTD = self.model.embed(own_NT, None if on_device else home.empty(shape, dtype))
        if not all(x_TD.isfinite().all() for x_TD in x_NTD):
            raise UserError("checkpoint: the embedding of the calibration text is not finite")
        if on_device:
            x_NTD = x_NTD.to(self.model.device)
        prompt_1PD = self.model.embed(torch.tensor([self.prompt_ids]).long())
        self._begin_before(0, x_NTD, home.copy(x_NTD), prompt_1PD, home)

    def resume(self, tokens_NT: Tensor, progress: Progress) -> None:
        """Begin behind the last finished block, where an interrupted run stopped.

        From the streams that were saved last, or from the embedded tokens, both streams pass through the finished
        blocks: forward passes alone, which end in the very numbers that the first run had.
        """
        if not progress.streams_at:
            self.begin(tokens_NT)
        else:
            streams = self.store.read_streams(progress.streams_at)
            x_fp, x_q = (self.share.of(streams[name], self.batch_size) for name in ("x_fp", "x_q"))
            home = self.home(x_fp.shape, x_fp.dtype)
            self._begin_before(progress.streams_at, home.hold(x_fp), home.hold(x_q), streams["prompt"], home)
        for index, metrics in enumerate(progress.metrics):
            self.inputs.micro_batch = min(self.inputs.micro_batch, metrics["micro_batch"])
            if index == self.next_block:
                self._replay(index)
                self.next_block += 1

    def home(self, shape: torch.Size, dtype: torch.dtype) -> StreamStorage:
        """Where streams of that shape [N, T, D] live."""
        wanted = wanted_streams(self.streams, self.memory)
        place = choose_place(wanted, shape.numel() * dtype.itemsize, self.model.device)
        return StreamStorage(place, self.model.device, self.store.run_dir)

    def _begin_before(
        self, next_block: int, x_fp: Tensor, x_q: Tensor, prompt_1PD: Tensor, home: StreamStorage
    ) -> None:
        """Begin before a block, with the streams [N, T, D] and the prompt's hidden states [1, P, D] there."""
        micro_batch = 1 if self.memory == "low" else self.batch_size
        self.inputs = LayerInputs(x_fp, x_q, self.model.device, micro_batch, home, self.share, self.solver.let_go)
        self.prompt_1PD, self.next_block = prompt_1PD, next_block

    def whole_streams(self) -> dict[str, Tensor]:
        """Both streams of the whole text, in its order, and the prompt's hidden states; of no use but to the first."""
        streams = {"x_fp": self.inputs.fp, "x_q": self.inputs.q}
        whole = {name: self.share.gather(stream, self.batch_size) for name, stream in streams.items()}
        return {name: stream for name, stream in whole.items() if stream is not None} | {"prompt": self.prompt_1PD}

    def _replay(self, index: int) -> None:
        """Advance both streams behind a finished block."""
        positions = self._positions(index)
        fp_layer, _ = self.reader.read(index)
        self.reader.read_ahead(index + 1)
        _, prompt = self._advance_fp(index, fp_layer, positions)
        prefix, stored = layer_prefix(index), self.store.read_block(index)
        packed = {
            name.removeprefix(prefix): tensor.to(self.model.device)
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        layer = hold_dense(self.model.packed_layer(index, packed, self.scheme), self.model.dtype)
        kv = BlockKV(self.kv_quantizer, prompt)
        outputs, _ = self.inputs.outputs_q(lambda hidden_BTD: run_layer_fast(layer, hidden_BTD, positions, kv))
        self.inputs.advance_q(outputs)

    def run(self) -> None:
        """Walk from the next block to the last."""
        gc.collect()
        gc.freeze()  # or a collection in between would take some tenths of a second, of all that share a batch
        try:
            blocks = self.relay.blocks(self.next_block, self.model.num_layers)
            self.reader.end = blocks.stop
            for index in blocks:
                if self.relay.only_passes_fp(index):
                    self._skip(index)
                    continue
                self._tell("on_block_start", index)
                result = self.calibrate(index)
                self.next_block = index + 1
                self._tell("on_block_end", result)
                self.signals.resume()  # a signal that came meanwhile ends the run when all have heard of the block
            self.relay.close()
        finally:
            gc.unfreeze()

    def _skip(self, index: int) -> None:
        """Let full-precision inputs through a block that was finished before."""
        self.prompt_1PD = self.relay.receive_fp(index, self.inputs, self.prompt_1PD)
        fp_layer, _ = self.reader.read(index)
        self.reader.read_ahead(index + self.relay.stages)
        self._advance_fp(index, fp_layer, self._positions(index))
        self.relay.send_fp(self.inputs, self.prompt_1PD)

    def calibrate(self, index: int) -> BlockResult:
        """Solve one block and advance both streams behind it."""
        clock = Stopwatch(self.model.device)
        (fp_layer, tensors), positions = self.reader.read(index), self._positions(index)
        clock.lap("read")
        self._receive(index, tensors, positions, clock)
        statistics, prompt = self._advance_fp(index, fp_layer, positions)
        self.relay.send_fp(self.inputs, self.prompt_1PD)
        scale = self.inputs.mean_square_target()
        clock.lap("full precision")

        block = self._block(index, tensors, positions, statistics, prompt)
        start = self.solver.start(block)
        hold_dense(start.layer, self.model.dtype)
        late = self.relay.final_inputs_come_late
        self.loss_initial = math.nan if late else self.inputs.loss_q(block.run(start.layer))
        clock.lap("start")
        self.reader.read_ahead(index + self.relay.stages)

        candidate = self._solve(block, start, scale, clock)
        self.loss_initial = keep_the_better(candidate, start, self.loss_initial, block)
        self.inputs.advance_q(candidate.outputs_NTD)
        clock.lap("advance")
        stored = self._stored(index, candidate.solution.layer, prompt)
        clock.lap("store")
        return BlockResult(
            index=index,
            tensors=stored,
            loss_initial=float(self.loss_initial),
            loss_final=candidate.loss.item(),
            relative_mse=(candidate.loss / scale).item(),
            kept_start=candidate.solution is start,
            micro_batch=self.inputs.micro_batch,
            stages=self.relay.stages,
            phases=clock.laps,
            theta=candidate.solution.theta,
        )

    def _receive(self, index: int, tensors: Mapping[str, Tensor], positions: Positions, clock: Stopwatch) -> None:
        """Have a block's full-precision inputs, and whatever else its first epochs learn on, in the streams."""
        if self.relay.should_warm_up(index):  # or stage after stage would compile
            self._warm_up(index, tensors, positions)
        self.prompt_1PD = self.relay.receive_fp(index, self.inputs, self.prompt_1PD)
        if self.relay.stages > 1:
            clock.lap("wait")
        if self.independent:
            self.inputs.advance_q(self.inputs.home.copy(self.inputs.fp))
        elif self.solver.fp_epochs:
            self.inputs.early = self.inputs.home.copy(self.inputs.fp)

    def _solve(self, block: Block, start: Solution, scale: Tensor, clock: Stopwatch) -> Candidate:
        """The solution, or the start where there is none, with what it gives for x_q.

        Raises:
            UserError: If the mean square of the target, the scale, is not finite.
        """
        candidate: Candidate | None = None

        def run_fused(layer: nn.Module, in_training: bool = False) -> None:
            nonlocal candidate
            candidate = None  # an earlier attempt's outputs are free before there are others
            clock.lap("solve")
            self.relay.receive_final(self.inputs)
            run = block.run(hold_dense(layer, self.model.dtype))
            # What training holds is free soon: no reason to go on by halves, unless others would not do the same.
            by_halves = not in_training or self.share.members > 1
            candidate = Candidate(Solution(layer), *self.inputs.outputs_q(run, by_halves))
            self._prepare(block.index + self.relay.stages)

        if not self.solver.learns:
            _check_finite(scale, block.index)
        solution = self.solver.solve(block, partial(run_fused, in_training=True)) or start
        _check_finite(scale, block.index)
        self.inputs.early = None
        if candidate is None or candidate.solution.layer is not solution.layer:
            run_fused(solution.layer)
        assert candidate is not None
        candidate.solution = solution
        return candidate

    def _block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        positions: Positions,
        statistics: InputStatistics,
        prompt: KeyValue | None,
    ) -> Block:
        return Block(
            index=index,
            model=self.model,
            tensors=tensors,
            scheme=self.scheme,
            activation_clip=self.solver.activation_clip,
            inputs=self.inputs,
            batch_size=self.batch_size,
            positions=positions,
            kv=BlockKV(self.kv_quantizer, prompt),
            statistics=statistics,
            orders=self.transform.orders(statistics),
            seed=self._block_seed(index),
            make_trainer=lambda epochs: self._trainer(index, epochs),
            relay=self.relay,
            partial=self.partials.get(index),
            frugal=self.memory == "low",
        )

    def _block_seed(self, index: int) -> int:
        return 1_000_003 * self.seed + 1009 * index

    def _prepare(self, index: int) -> None:
        """Do what a block to come needs of the host alone, while the device computes: or it would wait for that."""
        if self.solver.learns and index < self.reader.end:
            self.prepared = index, self.make_trainer(index, self.solver.epochs)
            self.solver.prepare(self.model, index, self._block_seed(index))

    def _trainer(self, index: int, epochs: int) -> Trainer:
        """The one that was prepared, once; or a fresh one."""
        prepared, self.prepared = self.prepared, None
        return prepared[1] if prepared is not None and prepared[0] == index else self.make_trainer(index, epochs)

    def _warm_up(self, index: int, tensors: Mapping[str, Tensor], positions: Positions) -> None:
        """Run a block, as it is and rounded, on one batch of whatever inputs there are, so that both are compiled."""
        few, layer = self.inputs.micro_batch * self.share.members, self.model.layer(index, tensors)
        _, prompt = self.model.encode_prompt(index, layer, self.prompt_1PD) if self.prompt_ids else (None, None)
        statistics, kv = InputStatistics(layer), BlockKV(None, prompt)
        self.inputs.loss_q(lambda hidden_BTD: run_layer_fast(layer, hidden_BTD, positions, kv), few)
        statistics.add_pass()
        block = self._block(index, tensors, positions, statistics, prompt)
        start = block.run(hold_dense(self.solver.start(block).layer, self.model.dtype))
        for sample in (few, sample_size(self.inputs)):  # which may be fewer than a batch
            self.inputs.loss_q(start, sample)

    def _positions(self, index: int) -> Positions:
        return self.model.positions(index, self.inputs.fp.shape[1], len(self.prompt_ids))

    def _advance_fp(
        self, index: int, fp_layer: nn.Module, positions: Positions
    ) -> tuple[InputStatistics, KeyValue | None]:
        """Turn x_fp into the block's full-precision output; figures of its inputs, and the prompt's keys and values."""
        prompt = self._advance_prompt(index, fp_layer)
        statistics, kv = InputStatistics(fp_layer), BlockKV(None, prompt)

        def run(hidden_BTD: Tensor) -> Tensor:
            output_BTD = run_layer_fast(fp_layer, hidden_BTD, positions, kv)
            statistics.add_pass()
            return output_BTD

        self.inputs.advance_fp(run)
        self.share.sum_(statistics.square_sum.values())
        self.share.max_(statistics.absmax.values())
        return statistics, prompt

    def _advance_prompt(self, index: int, fp_layer: nn.Module) -> KeyValue | None:
        """The prompt's keys and values in a block, as they will be stored."""
        if not self.prompt_ids:
            return None
        self.prompt_1PD, (key, value) = self.model.encode_prompt(index, fp_layer, self.prompt_1PD)
        storage = self.model.storage_dtype
        return key.to(storage).to(key.dtype), value.to(storage).to(value.dtype)

    def _stored(self, index: int, layer: nn.Module, prompt: KeyValue | None) -> dict[str, Tensor]:
        storage = self.model.storage_dtype
        assert storage is not None
        tensors = {layer_prefix(index) + name: tensor for name, tensor in stored_tensors(layer, storage).items()}
        if prompt is not None:
            names = PromptKV.names(index)
            tensors |= {PROMPT + name: tensor.to(storage) for name, tensor in zip(names, prompt, strict=True)}
        return tensors

    def _tell(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            if isinstance(callback, WalkCallback):
                getattr(callback, event)(self, *arguments)


def wanted_streams(streams: Streams, memory: Memory) -> Streams:
    """Where the streams shall live: as the setting says, or where saving device memory puts them."""
    return "host" if streams == "auto" and memory == "low" else streams


def _check_finite(target: Tensor, index: int) -> None:
    if not math.isfinite(target):
        raise UserError(f"checkpoint: the full-precision output of block {index} is not finite")
