"""Steps that are recorded once for all blocks end where steps that are not do; what a CPU can show of it.

Here a replay computes anew what a graph would replay: with the tensors, and the modules, that were recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from bisup_lightning.calibrate import block_calibration, captured_step, driver, solvers
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.cli import main
from bisup_lightning.run_layout import THETA
from tests.inputs import fit_command
from tests.processes import finish
from tests.tools import BISUP, EAGER, CutOff, Poison, contents, cut_off, timeless, with_callback

WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
ATOM = ("--config=configs/transform/atom.yaml", "--transform.outliers=16")


@dataclass
class Recorder:
    recordings: int = 0
    replays: int = 0
    leaves_room: bool = True

    def record(self, run, device):
        found = run()
        self.recordings += 1
        return found, Replay(self, run, found).replay


@dataclass
class Replay:
    recorder: Recorder
    run: Callable
    found: tuple

    def __deepcopy__(self, memo):
        raise TypeError("nor can a graph be copied")

    def replay(self):
        self.recorder.replays += 1
        with torch.enable_grad():
            loss, gradients = self.run()
        self.found[0].copy_(loss)
        for kept, gradient in zip(self.found[1], gradients, strict=True):
            kept.copy_(gradient)


class PretendRecording(WalkCallback):
    """The same in a process of its own, which ends with it; it must have replayed something."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        captured_step.capture = self.recorder.record
        block_calibration.can_capture = block_calibration.leaves_room = lambda device: True

    def on_walk_end(self, walk: BlockWalk) -> None:
        assert self.recorder.recordings == 1
        assert self.recorder.replays > 0


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(captured_step, "capture", recorder.record)
    monkeypatch.setattr(block_calibration, "can_capture", lambda device: True)
    monkeypatch.setattr(block_calibration, "leaves_room", lambda device: recorder.leaves_room)
    return recorder


def run_of(fit, checkpoint, folder, *more):
    return fit(checkpoint, folder, BISUP, "--solver.epochs=2", "--data.num_samples=16", *more)


def outcome(run):
    return contents(run / "model"), timeless(run)["blocks"]


def learned_unrecorded(fit, monkeypatch, checkpoint, folder, *more):
    with monkeypatch.context() as patched:
        patched.setattr(block_calibration, "can_capture", lambda device: False)
        return outcome(run_of(fit, checkpoint, folder, *more))


@pytest.mark.parametrize(
    ("model_type", "settings", "more", "recordings"),
    [
        ("llama", {}, (), 1),
        ("qwen2", {}, ("--config=configs/transform/quarot.yaml",), 1),
        ("qwen3", {}, ATOM, 1),
        ("qwen2", WINDOWS, ("--prompt.kind=none",), 2),  # the last two blocks see less, at other positions
        ("llama", {}, ("--solver.theta.smoothing=none", "--solver.theta.low_rank=none"), 1),
    ],
)
def test_one_recording_serves_all_blocks(
    make_checkpoint, fit, monkeypatch, recorder, tmp_path, model_type, settings, more, recordings
):
    checkpoint = make_checkpoint(model_type, num_hidden_layers=4, **settings)
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain", *more)
    assert recorder.recordings == 0
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded", *more)) == expected
    assert recorder.recordings == recordings
    assert recorder.replays == 4 * 8 - 2 * recordings  # of each recording's first block, two steps come before


def test_without_room_every_block_records_anew(make_checkpoint, fit, monkeypatch, recorder, tmp_path):
    checkpoint = make_checkpoint("llama")
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain")
    recorder.leaves_room = False
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded")) == expected
    assert (recorder.recordings, recorder.replays) == (2, 2 * (8 - 2))


def test_memory_that_is_not_in_use_makes_room_before_the_recording_does(
    make_checkpoint, fit, monkeypatch, recorder, tmp_path
):
    recorder.leaves_room = False
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(recorder, "leaves_room", True))
    run_of(fit, make_checkpoint("llama"), tmp_path / "recorded")
    assert (recorder.recordings, recorder.replays) == (1, 2 * 8 - 2)


def test_a_smaller_last_batch_is_not_replayed(make_checkpoint, fit, monkeypatch, recorder, tmp_path):
    checkpoint, more = make_checkpoint("llama"), ("--data.num_samples=15",)
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain", *more)
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded", *more)) == expected
    assert (recorder.recordings, recorder.replays) == (1, 2 * 2 * 3 - 2)


def test_whole_batches_take_the_place_of_a_smaller_one(make_checkpoint, fit_arguments, recorder, tmp_path):
    """Which is the first to be recorded, if the run goes on behind the first batch of a block."""
    command = fit_arguments(
        make_checkpoint("llama", num_hidden_layers=3), tmp_path / "run", BISUP, "--solver.epochs=5",
        "--data.num_samples=6", "--data.batch_size=4", EAGER, with_callback(CutOff),
    )  # fmt: skip
    cut_off(command, 1)
    assert main(command) == 0
    assert recorder.recordings == 2
    assert recorder.replays == 1 + 2 + 2 * 5  # a short and two whole ones in the first block, whole ones in the others


@pytest.mark.parametrize("averaging", ["StochasticWeightAveraging, init_args: {swa_lrs: 0.01}", "EMAWeightAveraging"])
def test_callbacks_may_copy_the_block(make_checkpoint, fit, monkeypatch, recorder, tmp_path, averaging):
    saving, copying = "callbacks.checkpoint.BlockCheckpoint", f"lightning.pytorch.callbacks.{averaging}"
    callbacks = f"--trainer.callbacks=[{{class_path: {saving}}}, {{class_path: {copying}}}]"
    more = (callbacks, "--solver.epochs=3", "--solver.optimization.schedule=constant")
    checkpoint = make_checkpoint("llama")
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain", *more)
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded", *more)) == expected
    assert recorder.recordings == 1


def test_where_memory_runs_out_the_recording_goes_first(make_checkpoint, fit, monkeypatch, recorder, tmp_path, caplog):
    checkpoint = make_checkpoint("llama", num_hidden_layers=3)
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain")
    run, failures = driver.run_layer_fast, []

    def scarce(*given):
        if recorder.recordings == 1 and not failures:
            failures.append(given)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*given)

    monkeypatch.setattr(driver, "run_layer_fast", scarce)
    monkeypatch.setattr(solvers, "run_layer_fast", scarce)
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded")) == expected
    assert len(failures) == 1
    assert recorder.recordings == 2
    assert "going on with half" not in caplog.text


def test_a_second_attempt_goes_on_with_the_recording(make_checkpoint, fit, monkeypatch, recorder, tmp_path):
    checkpoint, more = make_checkpoint("llama"), (with_callback(Poison), "--solver.epochs=3")
    Poison.doses = 1
    expected = learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain", *more)
    Poison.doses = 1
    assert outcome(run_of(fit, checkpoint, tmp_path / "recorded", *more)) == expected
    assert recorder.recordings == 1


def test_a_run_that_was_cut_off_inside_a_block_ends_in_the_same_bytes(
    make_checkpoint, fit_arguments, recorder, tmp_path
):
    def command(run):
        return fit_arguments(
            make_checkpoint("llama"), tmp_path / run, BISUP, "--solver.epochs=3", EAGER, with_callback(CutOff)
        )

    assert main(command("whole")) == 0
    for step in (4, 9):  # inside the first block behind the recording; inside the second, where it is another's
        cut_off(command(f"at-{step}"), step)
        assert main(command(f"at-{step}")) == 0
        assert contents(tmp_path / f"at-{step}" / "model") == contents(tmp_path / "whole" / "model")


def test_theta_that_is_kept_is_the_block_s_own(make_checkpoint, fit, monkeypatch, recorder, tmp_path):
    """Not what the recording computes with, which goes on to the next block."""
    checkpoint, more = make_checkpoint("llama"), ("--solver.keep_theta=true",)
    learned_unrecorded(fit, monkeypatch, checkpoint, tmp_path / "plain", *more)
    run_of(fit, checkpoint, tmp_path / "recorded", *more)
    plain, recorded = (contents(tmp_path / name / "blocks") for name in ("plain", "recorded"))
    kept = [name for name in plain if name.endswith(THETA)]
    assert len(kept) == 2
    assert {name: plain[name] for name in kept} == {name: recorded[name] for name in kept}


@pytest.mark.parametrize(("mode", "world"), [("data", 2), ("wavefront", 4)])  # two stages of two members each
def test_processes_that_work_together_record_alike(make_checkpoint, text_file, tmp_path, mode, world):
    checkpoint = make_checkpoint("llama", num_hidden_layers=5)
    for folder, more in (("plain", ()), ("recorded", (with_callback(PretendRecording),))):
        arguments = fit_command(
            checkpoint, tmp_path / folder, text_file, BISUP, "--solver.epochs=3", "--data.num_samples=16",
            f"--parallel.mode={mode}", *more,
        )  # fmt: skip
        finish(world, arguments)
    assert outcome(tmp_path / "recorded") == outcome(tmp_path / "plain")
