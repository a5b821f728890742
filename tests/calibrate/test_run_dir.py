"""A run directory that somebody else has filled, or that somebody else works in, and what `--resume` asks of one."""

import json
import os
import pickle
import shutil
import signal
import time

import pytest

from bisup_lightning.calibrate import run_lock
from bisup_lightning.calibrate.run_lock import SILENCE
from bisup_lightning.calibrate.run_reader import digest_of
from bisup_lightning.cli import main
from bisup_lightning.files import sha256
from bisup_lightning.run_layout import OWNER
from tests.inputs import fit_command
from tests.processes import Run
from tests.tools import BISUP, EAGER, RTN, Interrupt, Interrupted, Watch, contents, traces, with_callback

SETTINGS = (BISUP, "--solver.epochs=3", EAGER, with_callback(Watch), with_callback(Interrupt))


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def whole(checkpoint, text_file, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(fit_command(checkpoint, run, text_file, *SETTINGS)) == 0
    return run


@pytest.fixture(scope="module")
def stopped(checkpoint, text_file, tmp_path_factory):
    """A run that was cut off inside block 1."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    Interrupt.at = ("on_train_epoch_end", 1)
    with pytest.raises(Interrupted):
        main(fit_command(checkpoint, run, text_file, *SETTINGS))
    Interrupt.at = None
    return run


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def command(fit_arguments, checkpoint, run):
    return fit_arguments(checkpoint, run, *SETTINGS)


@pytest.fixture
def refused(capsys):
    """`refused(command, run, "names", …)`: exit code 2, one line, nothing touched."""

    def check(command, run, *words):
        before = traces(run) if run.exists() else None
        capsys.readouterr()
        assert main(command) == 2
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1, captured.err
        for word in ("error: ", *words):
            assert word in captured.err
        assert (traces(run) if run.exists() else None) == before
        return captured.err

    return check


def forge(run, change):
    """Rewrite the manifest, with a digest that fits."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    manifest["sha256"] = digest_of(manifest["fingerprint"], manifest["files"])
    path.write_text(json.dumps(manifest))


# --- a manifest from a stranger ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../mine.txt", "/etc/passwd", "blocks/../../mine.txt", "model/..", "model/.", "model/a/b", "mine.txt", "",
        "streams/x.safetensors", "blocks/1/block.safetensors", "partial/00001-0-000003.ckpt/../../../mine.txt",
        "streams/00001.safetensors\n", "manifest.json",
    ],
)  # fmt: skip
def test_a_manifest_with_a_name_that_no_run_writes_is_refused(refused, command, run, tmp_path, name):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    forge(run, lambda files: files.update({name: sha256(mine)}))
    refused(command, run, "manifest.json is damaged", "which no run writes")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["blocks", "blocks/00000", "streams", "partial", "blocks/00000/block.safetensors"])
def test_a_link_that_leads_out_of_the_run_is_refused(refused, command, run, tmp_path, name):
    """What is replaced would be deleted there."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    before = traces(elsewhere)
    refused(command, run, "manifest.json is damaged", "is a link that leads elsewhere")
    assert traces(elsewhere) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"fingerprint": 3, "files": 4, "sha256": 5}', "[" * 100_000, "\0"],
)
def test_a_manifest_that_is_none_is_refused(refused, command, run, text):
    (run / "manifest.json").write_text(text)
    refused(command, run, "manifest.json is damaged")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blocks/00000/metrics.json", b"[]"),
        ("blocks/00000/metrics.json", b"{}"),
        ("blocks/00000/metrics.json", b"nonsense"),
        ("tokens.safetensors", b"nonsense"),
        ("streams/00001.safetensors", b"nonsense"),
    ],
)
def test_a_file_that_no_run_writes_is_refused_under_a_digest_that_fits(refused, command, run, name, content):
    (run / name).write_bytes(content)
    forge(run, lambda files: files.update({name: sha256(run / name)}))
    refused(command, run, "run_dir: ")


def test_a_pickle_is_not_run(command, run, whole, tmp_path, caplog):
    """In the place of a partial checkpoint, under a digest that fits: not used, and the block begins anew."""
    ran = tmp_path / "ran"

    class Malice:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    (path,) = (run / "partial").iterdir()
    path.write_bytes(pickle.dumps(Malice()))
    forge(run, lambda files: files.update({f"partial/{path.name}": sha256(path)}))
    assert main(command) == 0
    assert not ran.exists()
    assert any(path.name in message and "no checkpoint" in message for message in caplog.messages)
    assert contents(run / "model") == contents(whole / "model")


@pytest.mark.parametrize("command_line", ["test --run_dir={} --accelerator=cpu", "predict --run_dir={} --text=Hello"])
def test_a_damaged_model_is_not_measured_nor_asked(refused, whole, tmp_path, command_line):
    """Its figures would be silently wrong."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    shard = copy / "model" / "model-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(command_line.format(copy).split(), copy, shard.name, "run fit again")


# --- two at a time ----------------------------------------------------------------------------------------------------


def test_a_second_process_is_kept_out_and_a_killed_ones_run_taken_over(refused, fit_arguments, checkpoint, whole, run):
    command = fit_arguments(checkpoint, run, *SETTINGS)
    first = Run(command, environment={"INTERRUPT_AT": "on_train_epoch_end:1", "INTERRUPT_BY": "SIGSTOP"})
    deadline = time.monotonic() + 60
    while not (run / OWNER).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.signal(signal.SIGSTOP)
    host = os.uname().nodename
    line = refused(command, run, f"in use by process {first.pid} on {host}, which started")
    seconds = int(line.split("which started ")[1].split(" s ago")[0])
    assert 0 <= seconds <= 60
    first.signal(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    assert (run / OWNER).exists()
    assert main(command) == 0
    assert not (run / OWNER).exists()
    assert contents(run / "model") == contents(whole / "model")


def owned_elsewhere(run, silent_for):
    owner = run / OWNER
    owner.write_text(json.dumps({"pid": 7, "host": "far-away", "since": time.time() - 5000}))
    os.utime(owner, (time.time() - silent_for,) * 2)


def test_an_owner_on_another_host_is_believed_while_it_shows_life(refused, command, run):
    owned_elsewhere(run, SILENCE / 2)
    refused(command, run, "process 7 on far-away, which started 50", "try again in 60 s")


@pytest.mark.parametrize("text", ['{"pid": 7, "host": "far-away", "since": 0}', "", "[]", '{"host": 3}', "nonsense"])
def test_a_silent_owner_elsewhere_or_one_that_cannot_be_read_is_taken_over(command, run, whole, text):
    owned_elsewhere(run, SILENCE * 2)
    (run / OWNER).write_text(text)
    os.utime(run / OWNER, (time.time() - SILENCE * 2,) * 2)
    assert main(command) == 0
    assert not (run / OWNER).exists()
    assert contents(run / "model") == contents(whole / "model")


def test_without_kernel_locks_an_owner_on_this_host_is_believed_while_it_shows_life(refused, monkeypatch, command, run):
    """A file system that knows no locks: a live neighbour must not be taken for a dead one."""

    def unsupported(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    (run / OWNER).write_text(json.dumps({"pid": 7, "host": os.uname().nodename, "since": time.time()}))
    refused(command, run, f"process 7 on {os.uname().nodename}", "try again in 60 s")
    os.utime(run / OWNER, (time.time() - SILENCE * 2,) * 2)
    assert main(command) == 0


def test_an_owner_shows_life(monkeypatch, run):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.02)
    with run_lock.RunLock(run) as lock:
        lock.claim()
        os.utime(run / OWNER, (1, 1))
        deadline = time.monotonic() + 10
        while (run / OWNER).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not (run / OWNER).exists()


# --- what --resume asks -----------------------------------------------------------------------------------------------


def test_resume_must_wants_something_to_go_on_with(refused, fit_arguments, checkpoint, tmp_path):
    run = tmp_path / "none"
    refused(fit_arguments(checkpoint, run, RTN, "--resume=must"), run, "resume: ", str(run), "drop --resume must")
    run.mkdir()
    refused(fit_arguments(checkpoint, run, RTN, "--resume=must"), run, "resume: ", str(run), "drop --resume must")


def test_resume_must_goes_on(command, run, whole):
    Watch.fresh()
    assert main([*command, "--resume=must"]) == 0
    assert [result.index for result in Watch.results] == [1]
    assert contents(run / "model") == contents(whole / "model")
    assert main([*command, "--resume=must"]) == 0  # a finished run, too


def test_resume_never_wants_a_new_directory(refused, command, run, fit_arguments, checkpoint, whole, tmp_path):
    refused([*command, "--resume=never"], run, "resume: ", str(run), "name a new run_dir")
    refused([*command, f"--run_dir={whole}", "--resume=never"], whole, "resume: ", "name a new run_dir")
    for place in (tmp_path / "new", tmp_path / "empty"):
        if place.name == "empty":
            place.mkdir()
        assert main(fit_arguments(checkpoint, place, *SETTINGS, "--resume=never")) == 0
        assert contents(place / "model") == contents(whole / "model")


def test_resume_may_change_between_runs(command, run, whole):
    assert main([*command, "--resume=auto"]) == 0
    assert contents(run / "model") == contents(whole / "model")
