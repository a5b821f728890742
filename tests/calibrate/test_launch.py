"""Starting several processes, ending them, and what is refused before or when they start."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bisup_lightning.calibrate.parallel import own_device
from bisup_lightning.cli import main
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.errors import UserError
from tests.inputs import ROOT, fit_command
from tests.processes import ranks, wait_for_all
from tests.tools import BISUP, EAGER, GPTQ, RTN, CutOff, contents, cut_off, with_callback

DATA, WAVEFRONT, INDEPENDENT = (f"--parallel.mode={mode}" for mode in ("data", "wavefront", "independent"))
TWO, FOUR = "--trainer.devices=2", "--trainer.devices=4"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def command(checkpoint, text_file, tmp_path):
    """Arguments of a small `fit`."""
    return lambda *more: fit_command(checkpoint, tmp_path / "run", text_file, BISUP, "--solver.epochs=3", *more)


def children(pid):
    """Processes that the launcher started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if int(parent) == pid and "LOCAL_RANK" in environment:
            found[int(environment["LOCAL_RANK"])] = int(folder.name)
    return found


@pytest.fixture
def launched(command, tmp_path):
    """A run that the command line has launched in processes of its own, once something is in its directory."""

    def start(sign, *more):
        arguments = [sys.executable, "main.py", *command(*more)]
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while not (tmp_path / "run" / sign).exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        return process

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_all_and_is_named_and_the_same_command_goes_on(launched, command, tmp_path):
    process = launched("blocks/00000", WAVEFRONT, TWO, "--solver.epochs=60")
    pids = children(process.pid)
    assert sorted(pids) == [0, 1]
    os.kill(pids[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert stderr.splitlines()[-1] == "error: rank 1 was ended by SIGKILL; the same command goes on from here"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_the_launcher_saves_the_training_and_ends_all(launched, tmp_path):
    process = launched("manifest.json", DATA, TWO, "--solver.epochs=4000")
    pids = children(process.pid)
    time.sleep(5.0)  # by then the first block has long begun to learn
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.count("interrupted; the same command goes on from here") == 1
    assert list((tmp_path / "run" / "partial").glob("00000-*.ckpt"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((TWO,), ("parallel.mode", "data, wavefront or independent", "2 devices")),
        (("--trainer.devices=few", DATA), ("trainer.devices", "few")),
        (("--trainer.devices=0", DATA), ("trainer.devices", "0")),
        (("--trainer.devices=3", DATA), ("data.batch_size", "4 must be a multiple of the 3 processes")),
        ((TWO, DATA, "--data.num_samples=6"), ("data.batch_size", "data.num_samples (6)")),
        ((TWO, WAVEFRONT, GPTQ), ("parallel.mode", "several epochs", "data")),
        ((TWO, WAVEFRONT, RTN), ("parallel.mode", "several epochs")),
        ((FOUR, WAVEFRONT, "--parallel.stages=3"), ("parallel.stages", "3 must divide the 4 processes")),
        ((FOUR, WAVEFRONT, "--parallel.stages=4"), ("parallel.stages", "not exceed the 3 epochs")),
        ((WAVEFRONT, "--parallel.stages=0"), ("parallel.stages", "1 or more")),
        ((DATA, "--parallel.stages=1"), ("parallel.stages", "goes with parallel.mode wavefront")),
        (("--parallel.mode=both",), ("parallel.mode", "both")),
        (("--blocks=0:1",), ("blocks", "--parallel.mode independent")),
        ((INDEPENDENT, "--blocks=1:9"), ("blocks", "1:9", "<= 2")),
        ((INDEPENDENT, "--blocks=one"), ("blocks", "one", "first:end")),
        ((INDEPENDENT, "--blocks=1:1"), ("blocks", "1:1")),
    ],
)
def test_what_can_not_be_arranged_is_refused_in_one_line(command, tmp_path, capfd, more, words):
    extra = [one for one in more if not one.startswith("--solver=")]
    arguments = [one for one in command(*extra) if more[-1] not in (GPTQ, RTN) or not one.startswith("--solver")]
    assert main([*arguments, *(one for one in more if one.startswith("--solver="))]) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert all(word in stderr for word in words), stderr
    assert not (tmp_path / "run").exists()


def test_more_stages_than_blocks_are_refused_by_the_first_process_alone(command, tmp_path):
    ended = wait_for_all(ranks(3, command(WAVEFRONT)))
    assert ended[0] == (2, "error: parallel.mode: 3 stages are more than the model's 2 blocks; start fewer\n")
    assert not any(line.startswith("error:") for _, stderr in ended[1:] for line in stderr.splitlines())
    assert not (tmp_path / "run").exists()


def test_a_directory_that_the_hosts_do_not_share_is_refused(command, tmp_path, text_file, checkpoint):
    elsewhere = fit_command(checkpoint, tmp_path / "elsewhere", text_file, BISUP, "--solver.epochs=3", DATA)
    code, stderr = wait_for_all(ranks(2, command(DATA), second=elsewhere))[1]
    assert code == 2
    assert stderr.startswith("error: rank 1: run_dir: ")
    assert "a directory that they share" in stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (DATA, (DATA, "--seed=5"), "seed: 0 → 5"),
        (DATA, (DATA, "--precision.weights.bits=3"), "precision.weights.bits: 4 → 3"),
        (DATA, (WAVEFRONT, "--parallel.stages=1"), "parallel.mode data"),
        (WAVEFRONT, (WAVEFRONT, "--memory=low"), "memory auto"),
    ],
)
def test_a_process_that_was_asked_for_something_else_is_refused(command, tmp_path, first, second, key):
    """Its blocks would go into the same model."""
    code, stderr = wait_for_all(ranks(2, command(first), second=command(*second)))[1]
    assert code == 2
    assert stderr.startswith("error: rank 1: a process")
    assert key in stderr
    assert not (tmp_path / "run" / "model").exists()


def test_a_process_with_another_checkpoint_is_refused(command, checkpoint, text_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 2e-5}))
    elsewhere = fit_command(other, tmp_path / "run", text_file, BISUP, "--solver.epochs=3", DATA)
    code, stderr = wait_for_all(ranks(2, command(DATA), second=elsewhere))[1]
    assert code == 2
    assert "checkpoint/config.json: " in stderr


def test_several_processes_need_a_mode(command, tmp_path):
    assert [code for code, _ in wait_for_all(ranks(2, command()))] == [2, 2]
    assert not (tmp_path / "run").exists()


def test_a_timer_would_end_one_member_before_another(command, tmp_path, capfd):
    timer = "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.Timer, init_args: {interval: step}}"
    assert main(command(DATA, TWO, timer)) == 2
    assert "trainer.callbacks: a Timer" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_script_with_several_tasks_is_told_of_srun(command, monkeypatch, tmp_path, capfd):
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "quantize", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert main(command(DATA)) == 2
    assert "begin the command with srun" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("local_rank", "visible", "device"), [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3)])
def test_a_process_takes_its_own_device_or_the_only_one_that_it_sees(local_rank, visible, device):
    assert own_device(local_rank, visible) == device


def test_more_processes_than_devices_are_refused():
    with pytest.raises(UserError, match=r"trainer.devices: process 4 of this host has no device; it has 4"):
        own_device(4, 4)


def dated(prompts):
    """In place of `Prompt.ids`: another prompt each time, as a template gives that names the day."""
    return lambda self, tokenizer, config: next(prompts)


def test_a_run_keeps_the_prompt_that_it_began_with(command, monkeypatch, tmp_path):
    arguments = command(EAGER, with_callback(CutOff))
    monkeypatch.setattr(Prompt, "ids", dated(iter([[5, 6, 7]])))
    assert main(arguments) == 0
    expected = contents(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(Prompt, "ids", dated(iter([[5, 6, 7], [5, 6, 8]])))
    cut_off(arguments, 2)
    assert main(arguments) == 0
    assert contents(tmp_path / "run" / "model") == expected


def test_blocks_behind_different_prompts_do_not_merge(checkpoint, text_file, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(Prompt, "ids", dated(iter([[5, 6, 7], [5, 6, 8]])))
    runs = []
    for blocks in ("0:1", "1:2"):
        runs.append(str(tmp_path / blocks[0]))
        assert (
            main(fit_command(checkpoint, tmp_path / blocks[0], text_file, RTN, INDEPENDENT, f"--blocks={blocks}")) == 0
        )
    assert main(["merge", *runs, f"--run_dir={tmp_path / 'merged'}"]) == 2
    assert f"merge: {runs[1]} stood behind another prompt than {runs[0]}" in capfd.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_only_runs_that_belong_together_merge(command, checkpoint, text_file, tmp_path, capfd):
    def part(name, *more):
        arguments = fit_command(checkpoint, tmp_path / name, text_file, RTN, *more)
        assert main(arguments) == 0
        return str(tmp_path / name)

    plain = part("plain")
    one, other = part("one", INDEPENDENT, "--blocks=0:1"), part("other", INDEPENDENT, "--blocks=1:2", "--seed=7")
    before = contents(tmp_path)
    for runs, words in (
        ([plain, one], "depend on each other"),
        ([one], "no run has block 1"),
        ([one, other], "differs from"),
        ([str(tmp_path / "nowhere")], "nowhere"),
    ):
        capfd.readouterr()
        assert main(["merge", *runs, f"--run_dir={tmp_path / 'merged'}"]) == 2
        stderr = capfd.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1
    assert contents(tmp_path) == before
