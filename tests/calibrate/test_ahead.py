"""What the host does before it must, so that a GPU need not wait for it: the same bytes, at another time."""

import gc
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jsonargparse import Namespace

from bisup_lightning.calibrate import solvers
from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.block_reader import BlockReader
from bisup_lightning.calibrate.block_trainer import BlockFitLoop
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.epoch_log import EpochLog
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.measure import read_results
from bisup_lightning.cli import main
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.errors import UserError
from bisup_lightning.job_config import trainer_factory
from bisup_lightning.model.blockwise import BlockwiseModel
from tests.tools import BISUP, EAGER, CutOff, Poison, Watch, contents, cut_off, timeless, with_callback

BLOCKS = 3


def kept(run):
    """How many blocks of a run kept their start, whose outputs are then computed, too."""
    return sum(block["kept_start"] for block in read_results(run)["blocks"])


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=BLOCKS)


class SecondBlock(Poison):
    """Poisons the first training of the second block: the first one for which anything is prepared."""

    def on_block_start(self, walk, index):
        Poison.doses = int(index == 1)


@pytest.mark.parametrize("callback", [Watch, SecondBlock])
def test_work_done_ahead_changes_no_byte(fit, checkpoint, monkeypatch, tmp_path, callback):
    """Nor where a training must be repeated, whose A and B were drawn ahead."""

    def run(name):
        Watch.fresh()
        return fit(
            checkpoint, tmp_path / name, "--solver.epochs=2", "--solver.keep_theta=true", with_callback(callback)
        )

    ahead = run("ahead")
    monkeypatch.setattr(BlockWalk, "_prepare", lambda self, index: None)
    monkeypatch.setattr(BlockCalibration, "on_train_end", lambda self: self.epoch_log.tell(self.loggers))
    in_turn = run("in_turn")
    assert contents(ahead / "model") == contents(in_turn / "model")
    assert timeless(ahead) == timeless(in_turn)


def test_nothing_of_a_training_that_diverged_is_passed_on(fit, checkpoint, monkeypatch, tmp_path):
    passed, outputs_q = [], LayerInputs.outputs_q

    def computed(self, *arguments, **options):
        outputs, loss = outputs_q(self, *arguments, **options)
        passed.append(loss.item())
        return outputs, loss

    monkeypatch.setattr(LayerInputs, "outputs_q", computed)
    fit(checkpoint, tmp_path / "run", "--solver.epochs=2", with_callback(SecondBlock))
    assert Poison.doses == 0
    assert len(passed) == BLOCKS + kept(tmp_path / "run")
    assert all(math.isfinite(loss) for loss in passed)


class Trained(WalkCallback):
    """Keeps what was trained."""

    modules: ClassVar[list[BlockCalibration]] = []

    def on_train_end(self, trainer, pl_module):
        self.modules.append(pl_module)


@pytest.mark.parametrize("memory", ["auto", "low"])  # several sequences at a time, or one
def test_what_does_not_fit_beside_a_training_has_its_turn_behind_it(fit, checkpoint, monkeypatch, tmp_path, memory):
    """And in whole batches, as everything before."""
    settings = ("--solver.epochs=1", f"--memory={memory}")
    expected = fit(checkpoint, tmp_path / "expected", *settings)
    failures, run_layer_fast = [], solvers.run_layer_fast
    Trained.modules.clear()

    def scarce(layer, hidden_BTD, *more):
        if Trained.modules and Trained.modules[-1].run_fused is not None:  # it is not released yet
            failures.append(len(Trained.modules))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run_layer_fast(layer, hidden_BTD, *more)

    monkeypatch.setattr(solvers, "run_layer_fast", scarce)
    run = fit(checkpoint, tmp_path / "run", *settings, with_callback(Trained))
    assert failures == [1, 2, 3]
    assert timeless(run) == timeless(expected)
    assert contents(run / "model") == contents(expected / "model")


def test_the_fused_block_is_computing_before_loggers_hear_of_the_last_epoch(fit, checkpoint, monkeypatch, tmp_path):
    happened, tell, outputs_q = [], EpochLog.tell, LayerInputs.outputs_q
    prepare = BlockWalk._prepare

    def told(self, *arguments):
        happened.append("told")
        tell(self, *arguments)

    def computed(self, *arguments, **options):
        happened.append("computed")
        return outputs_q(self, *arguments, **options)

    def prepared(self, index):
        happened.append("prepared")
        prepare(self, index)

    monkeypatch.setattr(BlockWalk, "_prepare", prepared)
    monkeypatch.setattr(EpochLog, "tell", told)
    monkeypatch.setattr(LayerInputs, "outputs_q", computed)
    fit(checkpoint, tmp_path / "run", "--solver.epochs=1")
    assert not kept(tmp_path / "run")
    # First at the epoch's end, as a CPU knows its loss by then.
    assert happened == ["told", "computed", "prepared", "told"] * BLOCKS


class Frozen(WalkCallback):
    """Counts what the garbage collector leaves alone."""

    counts: ClassVar[list[int]] = []

    def on_block_start(self, walk, index):
        self.counts.append(gc.get_freeze_count())


def test_a_walk_lets_the_collector_skip_what_was_there_before(fit, checkpoint, tmp_path):
    Frozen.counts.clear()
    gc.collect()
    before = len(gc.get_objects())
    fit(checkpoint, tmp_path / "run", with_callback(Frozen))
    assert len(Frozen.counts) == BLOCKS
    assert min(Frozen.counts) > 0.9 * before
    assert gc.get_freeze_count() == 0


def test_blocks_are_read_by_one_thread(checkpoint):
    reader = BlockReader(BlockwiseModel(checkpoint, torch.device("cpu")))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reader._take_one_core()  # as with a GPU
        assert reader._executor.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
        reader.close()


@pytest.fixture
def scarce_reader(checkpoint, monkeypatch):
    """`scarce_reader(failures)`: a reader of blocks that runs out of memory so often, and what it let go of."""

    def make(failures):
        let_go, read = [], BlockReader.read

        def failing(self, index, stream):
            nonlocal failures
            if failures:
                failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self, "_stream", None)
                return read(self, index)

        monkeypatch.setattr(BlockReader, "_read", failing)
        reader = BlockReader(BlockwiseModel(checkpoint, torch.device("cpu")), lambda: let_go.append(True))
        reader._stream = object()  # as with a GPU
        return reader, let_go

    return make


def test_a_block_that_did_not_fit_beside_a_training_is_read_again(scarce_reader, checkpoint):
    reader, let_go = scarce_reader(1)
    reader.read_ahead(1)
    _, tensors = reader.read(1)
    expected = BlockwiseModel(checkpoint, torch.device("cpu")).layer_tensors(1)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert let_go == [True]
    reader.close()


def test_a_device_without_room_for_a_block_is_one_line(scarce_reader):
    reader, _ = scarce_reader(2)
    with pytest.raises(UserError, match="streams: the device has no room for block 0"):
        reader.read(0)
    reader.close()


def test_a_trainers_loop_keeps_the_trainers_limits():
    settings = Namespace(logger=False, callbacks=None, devices=1, max_steps=7, min_epochs=2, accelerator="cpu")
    trainer = trainer_factory(settings, [], Path(), torch.device("cpu"))(0, 3)
    assert isinstance(trainer.fit_loop, BlockFitLoop)
    assert (trainer.min_epochs, trainer.max_epochs, trainer.max_steps) == (2, 3, 7)


@pytest.fixture
def given_back(monkeypatch):
    """How often cached memory was given back."""
    times = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append(True))
    return times


def test_a_training_gives_no_memory_back(fit, checkpoint, given_back, tmp_path):
    """A GPU's allocator would wait for all that is being computed, and ask for the memory again."""
    fit(checkpoint, tmp_path / "run", "--solver.epochs=1")
    assert not given_back


def test_what_a_saved_training_was_loaded_from_is_given_back(fit_arguments, checkpoint, given_back, tmp_path):
    command = fit_arguments(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=2", EAGER, with_callback(CutOff))
    cut_off(command, 1)
    assert not given_back
    assert main(command) == 0
    assert given_back
