"""What the host does before it must, so that a GPU need not wait for it: the same bytes, at another time."""

import gc
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jsonargparse import Namespace

from bisup_lightning.calibrate.block_calibration import BlockCalibration
from bisup_lightning.calibrate.block_reader import BlockReader
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.epoch_log import EpochLog
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.strategy import BlockFitLoop
from bisup_lightning.cli import trainer_factory
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.model.blockwise import BlockwiseModel
from tests.tools import Poison, contents, timeless, with_callback

BLOCKS = 3


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=BLOCKS)


@pytest.mark.parametrize("doses", [0, 1])
def test_work_done_ahead_changes_no_byte(fit, checkpoint, monkeypatch, tmp_path, doses):
    """Nor where a training must be repeated, whose A and B were drawn ahead."""

    def run(name):
        Poison.doses = doses
        return fit(checkpoint, tmp_path / name, "--solver.epochs=2", "--solver.keep_theta=true", with_callback(Poison))

    ahead = run("ahead")
    monkeypatch.setattr(BlockWalk, "_prepare", lambda self, index: None)
    monkeypatch.setattr(BlockCalibration, "on_train_end", lambda self: self.epoch_log.tell(self.loggers))
    in_turn = run("in_turn")
    assert contents(ahead / "model") == contents(in_turn / "model")
    assert timeless(ahead) == timeless(in_turn)


def test_the_fused_block_is_computing_before_loggers_hear_of_the_last_epoch(fit, checkpoint, monkeypatch, tmp_path):
    happened, tell, outputs_q = [], EpochLog.tell, LayerInputs.outputs_q

    def told(self, *arguments):
        happened.append("told")
        tell(self, *arguments)

    def computed(self, run):
        happened.append("computed")
        return outputs_q(self, run)

    monkeypatch.setattr(EpochLog, "tell", told)
    monkeypatch.setattr(LayerInputs, "outputs_q", computed)
    fit(checkpoint, tmp_path / "run", "--solver.epochs=1")
    assert happened == ["told", "computed", "told"] * BLOCKS  # at the epoch's end, as a CPU knows its loss by then


class Frozen(WalkCallback):
    """Counts what the garbage collector leaves alone."""

    counts: ClassVar[list[int]] = []

    def on_block_start(self, walk, index):
        self.counts.append(gc.get_freeze_count())


def test_a_walk_lets_the_collector_skip_what_was_there_before(fit, checkpoint, tmp_path):
    Frozen.counts.clear()
    fit(checkpoint, tmp_path / "run", with_callback(Frozen))
    assert len(Frozen.counts) == BLOCKS
    assert min(Frozen.counts) > 0.5 * len(gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_blocks_are_read_by_one_thread(checkpoint, monkeypatch):
    reader = BlockReader(BlockwiseModel(checkpoint, torch.device("cpu")))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert reader._executor.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        reader.close()


def test_a_trainers_loop_keeps_the_trainers_limits():
    settings = Namespace(logger=False, callbacks=None, devices=1, max_steps=7, min_epochs=2, accelerator="cpu")
    trainer = trainer_factory(settings, [], Path(), torch.device("cpu"))(0, 3)
    assert isinstance(trainer.fit_loop, BlockFitLoop)
    assert (trainer.min_epochs, trainer.max_epochs, trainer.max_steps) == (2, 3, 7)
