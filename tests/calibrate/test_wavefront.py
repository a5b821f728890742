"""Processes that calibrate blocks side by side: what they exchange, that they end alike, and that they go on alike."""

import json
import random
import shutil
import signal

import pytest

from bisup_lightning.calibrate import driver
from bisup_lightning.calibrate.block_reader import BlockReader
from bisup_lightning.calibrate.measure import evaluate_run
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.cli import main
from bisup_lightning.job_config import published_job
from tests.inputs import fit_command
from tests.processes import finish, ranks, wait_for_all
from tests.tools import BISUP, EAGER, GPTQ, contents, timeless

EPOCHS = 3
WAVEFRONT, DATA = "--parallel.mode=wavefront", "--parallel.mode=data"
PLAIN = f"--solver.fp_epochs={EPOCHS - 1}"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=5)


@pytest.fixture(scope="module")
def command(checkpoint, text_file):
    """Arguments of a `fit` of five blocks: `command(run_dir, WAVEFRONT, …)`."""
    return lambda run, *more: fit_command(checkpoint, run, text_file, BISUP, f"--solver.epochs={EPOCHS}", *more)


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory):
    """A walk of one process over the inputs that a wavefront's blocks learn on."""
    run = tmp_path_factory.mktemp("plain") / "run"
    assert main(command(run, PLAIN)) == 0
    return run


@pytest.fixture(scope="module", params=[2, 4])
def wavefront(request, command, tmp_path_factory):
    """A run of several stages that nothing disturbs: its directory, and the number of processes."""
    run = tmp_path_factory.mktemp("wavefront") / "run"
    # Four processes, three epochs: two stages of two members each.
    finish(request.param, command(run, WAVEFRONT))
    return run, request.param


def blocks_of(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]


def test_one_stage_is_the_plain_walk(command, plain, tmp_path):
    run = tmp_path / "run"
    assert main(command(run, WAVEFRONT)) == 0
    assert contents(run / "model") == contents(plain / "model")
    assert timeless(run) == timeless(plain)


def test_two_stages_are_the_plain_walk_to_the_byte(wavefront, plain):
    """Members of a stage add up in another order."""
    run, world = wavefront
    if world == 2:
        assert contents(run / "model") == contents(plain / "model")
    for block, block_of_plain in zip(blocks_of(run), blocks_of(plain), strict=True):
        assert block["stages"] == 2
        tolerance = 0 if world == 2 else 0.1 if block["index"] else 1e-2
        for loss in ("loss_initial", "loss_final"):
            assert block[loss] == pytest.approx(block_of_plain[loss], rel=tolerance)
        assert block["kept_start"] or block["loss_final"] < block["loss_initial"]


def test_what_was_measured_is_what_the_model_gives(wavefront):
    """The published model is the one that the stages fused: measured again by one process, to the digit."""
    run, _ = wavefront
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert evaluate_run(published_job(run, "cpu", Signals()))["perplexity"] == results["perplexity"]
    assert sorted(path.name for path in run.glob("manifest*")) == ["manifest.json"]
    assert not (run / "partial").exists()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_wavefront_killed_at_random_moments_ends_in_the_same_bytes(wavefront, command, tmp_path, seed):
    whole, world = wavefront
    if world == 4 and seed:
        pytest.skip("once is enough for four")
    run, draw = tmp_path / "run", random.Random(seed)
    for _ in range(3):
        runs = ranks(world, command(run, WAVEFRONT, EAGER))
        if runs[0].ends_within(draw.uniform(1.5, 6.0)):
            break
        draw.choice(runs).signal(signal.SIGKILL)
        wait_for_all(runs)
    finish(world, command(run, WAVEFRONT, EAGER))
    assert contents(run / "model") == contents(whole / "model")
    assert timeless(run) == timeless(whole)


def cut_off(command, run, world, sign, *more):
    """A run that is killed as soon as a file is there."""
    runs = ranks(world, command(run, *more))
    while not list(run.glob(sign)):
        assert not runs[0].ends_within(0.02)
    for one in runs:
        one.signal(signal.SIGKILL)
    wait_for_all(runs)


def test_finished_blocks_stay_and_the_others_go_on_inside(wavefront, command, tmp_path):
    whole, world = wavefront
    run = tmp_path / "run"
    cut_off(command, run, world, "partial/0000[2-4]-*.ckpt", WAVEFRONT, EAGER)
    before = {path: path.stat().st_mtime_ns for path in run.glob("blocks/?????/block.safetensors")}
    finish(world, command(run, WAVEFRONT, EAGER))
    kept = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert kept, "all was calibrated anew"
    assert contents(run / "model") == contents(whole / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "world", "more"), [(2, 1, (PLAIN,)), (2, 1, (WAVEFRONT,)), (1, 2, (WAVEFRONT,))])
def test_any_number_of_stages_goes_on_where_another_stopped(command, plain, tmp_path, begun, world, more):
    """Blocks and checkpoints inside blocks do not depend on how many learn at the same time."""
    run = tmp_path / "run"
    cut_off(command, run, begun, "partial/0000[2-4]-*.ckpt", WAVEFRONT, EAGER)
    finish(world, command(run, *more, EAGER))
    assert contents(run / "model") == contents(plain / "model")


def test_a_walk_on_other_inputs_is_another_run(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(run, WAVEFRONT)) == 0
    assert main(command(run)) == 2
    assert f"solver.init_args.fp_epochs: {EPOCHS - 1} → 0" in capsys.readouterr().err
    assert main(command(tmp_path / "never", WAVEFRONT, "--solver.fp_epochs=1")) == 2
    assert "solver.fp_epochs: in a wavefront" in capsys.readouterr().err
    assert main(command(tmp_path / "never", "--parallel.mode=independent", "--solver.fp_epochs=1")) == 2
    assert "solver.fp_epochs: independent blocks" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_a_block_that_can_not_learn_keeps_its_start_and_its_successor_goes_on(command, tmp_path):
    """A rate at which training is no better than the start; and one at which it is NaN, twice."""
    for rate in (0.0, 1e9):
        run = tmp_path / f"{rate}"
        finish(2, command(run, WAVEFRONT, *(f"--solver.optimization.{k}_lr={rate}" for k in ("clip", "low_rank"))))
        assert all(block["loss_final"] <= block["loss_initial"] for block in blocks_of(run))


def test_data_parallel_is_one_process_but_for_the_order_of_sums(command, plain, tmp_path):
    """After one epoch, before a rounding that falls the other way has had many consequences."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(one, "--solver.epochs=1")) == 0
    finish(2, command(two, "--solver.epochs=1", DATA))
    tolerances = [(1e-6, 1e-4), *[(2e-3, 1e-2)] * 4]  # behind the first block, for what such a rounding leads to
    for a, b, (initial, final) in zip(blocks_of(one), blocks_of(two), tolerances, strict=True):
        assert b["loss_initial"] == pytest.approx(a["loss_initial"], rel=initial)
        assert b["loss_final"] == pytest.approx(a["loss_final"], rel=final)


@pytest.mark.slow
def test_data_parallel_resumes_inside_a_block_and_from_streams(command, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(2, command(whole, DATA))
    cut_off(command, run, 2, "blocks/00001", DATA, EAGER)
    assert list((run / "streams").glob("*.safetensors"))
    finish(2, command(run, DATA, EAGER))
    assert contents(run / "model") == contents(whole / "model")
    shutil.rmtree(run)
    cut_off(command, run, 2, "blocks/00001", DATA, EAGER)
    finish(1, command(run))  # of any other number, too
    assert len(blocks_of(run)) == 5


@pytest.mark.slow
def test_gptq_and_orders_of_channels_add_up_over_the_members(command, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [GPTQ, "--transform=bisup_lightning.transform.reorder.Atom", "--transform.outliers=8"]
    assert main(command(one)[:-2] + settings) == 0
    finish(2, [*command(two)[:-2], *settings, DATA])
    tolerances = [1e-3, *[0.1] * 4]  # behind the first block, for what a rounding that falls the other way leads to
    for a, b, tolerance in zip(blocks_of(one), blocks_of(two), tolerances, strict=True):
        assert b["loss_final"] == pytest.approx(a["loss_final"], rel=tolerance)


def test_independent_blocks_merge_to_the_run_of_one_process(command, tmp_path):
    one, run = tmp_path / "one", tmp_path / "run"
    assert main(command(one, "--parallel.mode=independent")) == 0
    finish(2, command(run, "--parallel.mode=independent"))
    assert contents(run / "model") == contents(one / "model")
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, blocks, chunks in zip(parts, ("0:2", "2:5"), (4, 3), strict=True):  # the first's are measured
        measured = f"--evaluation.max_chunks={chunks}"
        assert main(command(part, "--parallel.mode=independent", f"--blocks={blocks}", measured)) == 0
        assert not (part / "model").exists()
    merged = tmp_path / "merged"
    assert main(["--trust_classes_from=tests", "merge", *map(str, parts), f"--run_dir={merged}"]) == 0
    assert contents(merged / "model") == contents(one / "model")
    assert timeless(merged) == timeless(one)


def test_no_block_is_read_ahead_behind_those_that_are_wanted(command, tmp_path, monkeypatch):
    read = []

    class ReadsAhead(BlockReader):
        """As on a GPU."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._stream = "a stream"

        def _read(self, index, stream):
            read.append(index)
            tensors = self.model.layer_tensors(index)
            return self.model.layer(index, tensors), tensors

    monkeypatch.setattr(driver, "BlockReader", ReadsAhead)
    assert main(command(tmp_path / "run", "--parallel.mode=independent", "--blocks=1:3")) == 0
    assert read == [0, 1, 2]
