"""A signal that asks a run to end is obeyed at a moment that loses nothing, and leaves the exit code that it should."""

import csv
import os
import signal

import pytest

from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.cli import main
from bisup_lightning.data.share import PeerLost
from bisup_lightning.evaluate.metrics import LanguageModelMetrics
from tests.inputs import fit_command
from tests.processes import Run
from tests.tools import BISUP, Interrupt, Watch, contents, with_callback

LINE = "interrupted; the same command goes on from here\n"
SETTINGS = (BISUP, "--solver.epochs=3", with_callback(Watch), with_callback(Interrupt))
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "quantize", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def whole(checkpoint, text_file, tmp_path_factory):
    """The model of a run that no signal disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(fit_command(checkpoint, run, text_file, *SETTINGS)) == 0
    return contents(run / "model")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def command(fit_arguments, checkpoint, run):
    return fit_arguments(checkpoint, run, *SETTINGS)


@pytest.fixture
def requeued(monkeypatch, tmp_path):
    """A SLURM job's environment; what `scontrol` was called with, a line for each call."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    calls, scontrol = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "what it says is nobody\'s concern"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def interrupted(monkeypatch, capsys, command, place, name):
    """Send the run a signal at a place; its exit code."""
    monkeypatch.setenv("INTERRUPT_AT", place)
    monkeypatch.setenv("INTERRUPT_BY", name)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    capsys.readouterr()
    code = main(command)
    assert capsys.readouterr().err == LINE
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    monkeypatch.delenv("INTERRUPT_AT")
    return code


def blocks_of(run):
    return sorted(path.name for path in (run / "blocks").glob("*"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("place", ["on_train_epoch_end:0", "on_train_epoch_end:1"])
def test_a_signal_inside_training_makes_the_next_step_the_last_and_saves_it(
    monkeypatch, capsys, command, run, whole, name, code, place
):
    """Behind the second of three epochs, two steps each: the fifth step is made."""
    block = int(place[-1])
    assert interrupted(monkeypatch, capsys, command, place, name) == code
    assert [path.name for path in (run / "partial").iterdir()] == [f"0000{block}-0-000005.ckpt"]
    assert blocks_of(run) == ["00000"][:block]
    assert not (run / "owner.json").exists()
    assert main(command) == 0
    assert contents(run / "model") == whole


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("place", ["on_train_end:0", "on_block_end:0", "on_block_start:1"])
def test_a_signal_behind_training_lets_the_block_finish_and_saves_it(
    monkeypatch, capsys, command, run, whole, name, code, place
):
    command = [*command, "--trainer.logger=true"]
    assert interrupted(monkeypatch, capsys, command, place, name) == code
    assert blocks_of(run) == ["00000"]
    Watch.fresh()
    assert main(command) == 0
    assert [result.index for result in Watch.results] == [1]
    with (run / "logs" / "blocks.csv").open(encoding="utf-8", newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == ["0", "1"]  # every callback heard of both
    assert contents(run / "model") == whole


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_measurement_ends_the_run_and_keeps_its_model(
    monkeypatch, capsys, command, run, whole, signum, code
):
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelMetrics, "update", lambda *arguments: os.kill(os.getpid(), signum))
        capsys.readouterr()
        assert main(command) == code
        assert capsys.readouterr().err == LINE
    assert contents(run / "model") == whole
    assert not (run / "results.json").exists()
    Watch.fresh()
    assert main(command) == 0
    assert not Watch.results
    assert contents(run / "model") == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_run_on_the_spot(command, run, whole, name):
    """Nothing more is saved, and nothing is lost but what came after the last time that something was."""
    environment = {"INTERRUPT_AT": "on_train_epoch_end:1", "INTERRUPT_BY": f"{name} {name}"}
    code, stderr = Run(command, environment=environment).wait()
    assert (code, stderr) == (128 + signal.Signals[name], "")
    assert blocks_of(run) == ["00000"]
    assert not (run / "partial").exists()
    assert main(command) == 0
    assert contents(run / "model") == whole


@pytest.mark.parametrize("place", ["on_train_epoch_end:1", "on_block_start:1"])
def test_a_slurm_job_that_is_preempted_goes_back_into_the_queue(
    monkeypatch, capsys, command, run, whole, requeued, place
):
    assert interrupted(monkeypatch, capsys, command, place, "SIGUSR1") == 128 + signal.SIGUSR1
    assert requeued() == ["requeue 4711"]
    assert (run / "partial").exists() == (place == "on_train_epoch_end:1")
    assert main(command) == 0
    assert requeued() == ["requeue 4711"]
    assert contents(run / "model") == whole


def test_a_task_of_a_slurm_array_goes_back_under_its_own_name(monkeypatch, capsys, command, requeued):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    interrupted(monkeypatch, capsys, command, "on_block_start:0", "SIGUSR1")
    assert requeued() == ["requeue 4700_11"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_slurm_job_that_is_cancelled_stays_so(monkeypatch, capsys, command, run, requeued, name, code):
    assert interrupted(monkeypatch, capsys, command, "on_train_epoch_end:0", name) == code
    assert requeued() == []
    assert [path.name for path in (run / "partial").iterdir()] == ["00000-0-000005.ckpt"]


def test_a_job_that_cannot_be_requeued_says_so(monkeypatch, capsys, command, requeued, tmp_path):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("INTERRUPT_AT", "on_block_start:0")
    monkeypatch.setenv("INTERRUPT_BY", "SIGUSR1")
    capsys.readouterr()
    assert main(command) == 128 + signal.SIGUSR1
    first, second = capsys.readouterr().err.splitlines()
    assert first + "\n" == LINE
    assert second.startswith("job 4711 can't be put back into the queue")


def test_a_process_that_follows_ends_by_the_signal_also_if_the_first_is_gone(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def gone():
        raise PeerLost("Connection reset by peer")

    with pytest.raises(PeerLost):
        Signals._end(gone, signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
