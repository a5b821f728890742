"""A run that keeps its Θ, and others that go on from there."""

import json
import shutil

import pytest

from bisup_lightning.cli import main
from tests.inputs import fit_command
from tests.tools import BISUP, EAGER, Interrupt, Interrupted, contents, timeless, with_callback

STILL = [f"--solver.optimization.{kind}_lr=0" for kind in ("clip", "smoothing", "low_rank")]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=3)


@pytest.fixture(scope="module")
def command(checkpoint, text_file):
    return lambda run, *more: fit_command(checkpoint, run, text_file, BISUP, *more)


def finished(command, run, *more):
    assert main(command(run, *more)) == 0
    return run


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory):
    """A plain walk that keeps its Θ."""
    run = tmp_path_factory.mktemp("plain") / "run"
    return finished(command, run, "--solver.epochs=3", "--solver.keep_theta=true")


@pytest.fixture(scope="module")
def independent(command, tmp_path_factory):
    """Blocks that never saw each other's errors."""
    run = tmp_path_factory.mktemp("independent") / "run"
    return finished(command, run, "--solver.epochs=3", "--solver.keep_theta=true", "--parallel.mode=independent")


def losses_of(run):
    return [block["loss_final"] for block in json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]]


def test_whoever_goes_on_without_a_step_stands_where_the_run_ended(command, plain, tmp_path):
    again = finished(command, tmp_path / "again", "--solver.epochs=1", f"--solver.theta_from={plain}", *STILL)
    assert contents(again / "model") == contents(plain / "model")
    assert losses_of(again) == losses_of(plain)


def test_an_epoch_behind_independent_blocks_wins_back_what_they_lost(command, plain, independent, tmp_path):
    start = f"--solver.theta_from={independent}"
    as_they_are = finished(command, tmp_path / "still", "--solver.epochs=1", start, *STILL)
    behind = finished(command, tmp_path / "behind", "--solver.epochs=1", start)
    assert losses_of(behind)[-1] < losses_of(as_they_are)[-1]
    from_rounding = finished(command, tmp_path / "one", "--solver.epochs=1")
    assert losses_of(behind)[-1] < losses_of(from_rounding)[-1]


def test_a_run_from_another_theta_that_was_cut_off_ends_in_the_same_bytes(command, independent, tmp_path, monkeypatch):
    more = ("--solver.epochs=2", f"--solver.theta_from={independent}", "--solver.keep_theta=true", EAGER)
    whole = finished(command, tmp_path / "whole", *more)
    monkeypatch.setattr(Interrupt, "at", ("on_train_epoch_end", 1))
    with pytest.raises(Interrupted):
        main(command(tmp_path / "cut", *more, with_callback(Interrupt)))
    monkeypatch.setattr(Interrupt, "at", None)
    cut = finished(command, tmp_path / "cut", *more, with_callback(Interrupt))
    assert contents(cut / "blocks").keys() == contents(whole / "blocks").keys()
    for part in ("block", "theta"):
        names = [f"blocks/{index:05d}/{part}.safetensors" for index in range(3)]
        assert [(cut / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def test_a_merged_run_keeps_the_theta_of_its_parts(command, independent, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    more = ("--solver.epochs=3", "--solver.keep_theta=true", "--parallel.mode=independent")
    for part, blocks in zip(parts, ("0:1", "1:3"), strict=True):
        finished(command, part, *more, f"--blocks={blocks}")
    merged = tmp_path / "merged"
    assert main(["--trust_classes_from=tests", "merge", *map(str, parts), f"--run_dir={merged}"]) == 0
    assert timeless(merged) == timeless(independent)
    for index in range(3):
        name = f"blocks/{index:05d}/theta.safetensors"
        assert (merged / name).read_bytes() == (independent / name).read_bytes()


@pytest.fixture
def line(command, tmp_path, capsys):
    """The one line that refuses a run, which must leave nothing behind."""

    def check(*more):
        assert main(command(tmp_path / "never", *more)) == 2
        (found,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "never").exists()
        return found

    return check


def test_a_damaged_theta_is_learned_anew_with_its_block(command, plain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    for name in ("results.json", "model"):  # as if it had not ended
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    theta = run / "blocks" / "00001" / "theta.safetensors"
    theta.write_bytes(theta.read_bytes()[:-1])
    finished(command, run, "--solver.epochs=3", "--solver.keep_theta=true")
    for name in ("theta", "block"):
        for index in range(3):
            path = f"blocks/{index:05d}/{name}.safetensors"
            assert (run / path).read_bytes() == (plain / path).read_bytes()


def test_a_theta_learned_on_another_text_is_refused(command, plain, text_file, tmp_path, capsys):
    """Even under the same name: orders of channels come from the text."""
    kept = text_file.read_bytes()
    try:
        text_file.write_bytes(kept[100:])
        assert main(command(tmp_path / "never", f"--solver.theta_from={plain}")) == 2
    finally:
        text_file.write_bytes(kept)
    assert f"differs in text/{text_file}" in capsys.readouterr().err


def test_a_dry_run_refuses_a_theta_of_another_rank(command, plain, tmp_path, capsys):
    assert main(command(tmp_path / "never", f"--solver.theta_from={plain}", "--solver.theta.rank=4", "--dry_run")) == 2
    assert "solver.init_args.theta.rank" in capsys.readouterr().err


def test_a_run_whose_theta_can_not_be_gone_on_from_is_refused(command, plain, line, tmp_path):
    def start(run):
        return f"--solver.theta_from={run}"

    assert "holds no finished run" in line(start(tmp_path / "nowhere"))
    forgetful = finished(command, tmp_path / "forgetful", "--solver.epochs=1")
    assert "--solver.keep_theta true" in line(start(forgetful))
    assert "solver.init_args.theta.rank" in line(start(plain), "--solver.theta.rank=4")
    assert "precision.weights.bits" in line(start(plain), "--precision.weights.bits=3")
    assert "seed" in line(start(plain), "--seed=1")
    damaged = shutil.copytree(plain, tmp_path / "damaged")
    theta = damaged / "blocks" / "00001" / "theta.safetensors"
    theta.write_bytes(theta.read_bytes()[:-1])
    assert f"{theta} is missing or damaged" in line(start(damaged))
    assert main(command(damaged, "--solver.epochs=3", "--solver.keep_theta=true")) == 0  # it is finished all the same
    assert f"{theta} is missing or damaged" in line(start(damaged))
    for message in (line(start(damaged)), line(start(forgetful))):
        assert message.startswith("error: solver.theta_from: ")
