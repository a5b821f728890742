"""A device too small for a batch: fewer sequences at a time, the same result, and it is said. NaN and inf."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from bisup_lightning.calibrate import block_calibration, driver, solvers
from bisup_lightning.calibrate.block_calibration import Optimization
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.cli import main
from bisup_lightning.model import blockwise
from bisup_lightning.model.checkpoint import INDEX
from tests.calibrate.test_block_calibration import Problem
from tests.tools import BISUP, EAGER, GPTQ, QUAROT, RTN, Interrupt, Interrupted, Poison, Watch, contents, with_callback

SAID = "out of device memory with {} sequences at a time; going on with half of them"


@pytest.fixture
def small_device(monkeypatch):
    """`small_device(2)`: blocks run out of memory above two sequences; `small_device.failures` counts how often."""

    def shrink(most, training_only=False):
        run_layer = blockwise.run_layer

        def limited(layer, hidden_BTD, positions, kv):
            if len(hidden_BTD) > most and (torch.is_grad_enabled() or not training_only):
                # Late, as in life: the linears have seen it.
                run_layer(layer, hidden_BTD, positions, kv)
                shrink.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return run_layer(layer, hidden_BTD, positions, kv)

        shrink.failures = 0
        for module, name in (
            (driver, "run_layer_fast"), (solvers, "run_layer_fast"), (solvers, "run_layer"),
            (block_calibration, "run_layer"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, limited)

    return shrink


@pytest.fixture(scope="module")
def problem(make_checkpoint):
    return Problem(make_checkpoint(num_hidden_layers=1))


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_give_the_theta_of_whole_ones(problem, micro_batch):
    """Gradients add up to the same but for the order of the sums; Adam's eps is small, so each tensor must agree."""
    whole, loss = problem.train(Optimization(), epochs=2)
    parts, loss_of_parts = problem.train(Optimization(), epochs=2, micro_batch=micro_batch)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


def results_of(run):
    return json.loads((run / "results.json").read_text())["blocks"]


@pytest.mark.parametrize("settings", [(RTN,), (RTN, QUAROT), (GPTQ,)], ids=["rtn", "quarot", "gptq"])
@pytest.mark.parametrize("most", [1, 2])
def test_forward_passes_in_halves_give_the_same_model(small_device, checkpoint, fit, tmp_path, caplog, settings, most):
    """Statistics and Hessians of GPTQ count each sequence once, so codes and scales come out the same."""
    run = fit(checkpoint, tmp_path / "whole", *settings)
    small_device(most)
    caplog.clear()
    halves = fit(checkpoint, tmp_path / "halves", *settings)
    assert [m for m in caplog.messages if "memory" in m] == [SAID.format(size) for size in (4, 2, 1) if size > most]
    assert [block["micro_batch"] for block in results_of(halves)] == [most, most]
    for name in ("model-00000.safetensors", "model-00001.safetensors"):
        one, two = load_file(run / "model" / name), load_file(halves / "model" / name)
        for key in one:
            if not one[key].is_floating_point():
                differ = (one[key] != two[key]).float().mean()
                assert differ < 0.01, key  # a tie that another order of a sum decides
            else:
                torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)


def test_training_that_runs_out_begins_again_in_halves(small_device, checkpoint, fit, tmp_path, caplog):
    run = fit(checkpoint, tmp_path / "whole", BISUP, "--solver.epochs=2")
    small_device(2, training_only=True)
    halves = fit(checkpoint, tmp_path / "halves", BISUP, "--solver.epochs=2")
    assert [m for m in caplog.messages if "memory" in m] == [SAID.format(4)]
    assert small_device.failures == 1  # and block 1 already knows
    for one, two in zip(results_of(run), results_of(halves), strict=True):
        assert two["micro_batch"] == 2
        assert two["loss_final"] == pytest.approx(one["loss_final"], rel=0.02)


@pytest.mark.parametrize("saved", [(), (EAGER,)], ids=["from the text", "from streams"])
def test_a_resumed_run_knows_what_fitted(small_device, checkpoint, fit_arguments, tmp_path, monkeypatch, saved):
    """And ends in the bytes of one that was not interrupted, though a batch's sums have another order."""
    small_device(2)
    settings = (BISUP, "--solver.epochs=2", *saved, with_callback(Interrupt))
    command = fit_arguments(checkpoint, tmp_path / "cut", *settings)
    assert main(fit_arguments(checkpoint, tmp_path / "whole", *settings)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "at", ("on_block_start", 1))
        with pytest.raises(Interrupted):
            main(command)
    small_device(4)  # would have room for whole batches now
    assert main(command) == 0
    assert [block["micro_batch"] for block in results_of(tmp_path / "cut")] == [2, 2]
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")


class Full(WalkCallback):
    """The device is full once, when training comes to a step."""

    step: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer, *event):
        if trainer.global_step == Full.step:
            Full.step = None
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_resumed_run_that_no_longer_fits_goes_on_by_halves(checkpoint, fit_arguments, tmp_path, monkeypatch):
    """Though the checkpoint that it resumed from has been replaced by a newer one since."""
    command = fit_arguments(
        checkpoint, tmp_path / "run", BISUP, "--solver.epochs=4", EAGER, with_callback(Interrupt), with_callback(Full)
    )
    monkeypatch.setattr(Interrupt, "at", ("on_train_epoch_end", 0))
    with pytest.raises(Interrupted):
        main(command)
    monkeypatch.setattr(Interrupt, "at", None)
    monkeypatch.setattr(Full, "step", 6)
    assert main(command) == 0
    assert Full.step is None
    assert [block["micro_batch"] for block in results_of(tmp_path / "run")] == [2, 2]


def test_one_sequence_that_does_not_fit_is_one_line(small_device, checkpoint, fit_arguments, tmp_path, capsys):
    small_device(0)
    assert main(fit_arguments(checkpoint, tmp_path / "run", RTN)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "data.seq_len" in error


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_a_diverged_block_that_is_killed_on_its_second_try_goes_on_there(
    monkeypatch, checkpoint, fit_arguments, tmp_path
):
    settings = (
        BISUP,
        "--solver.epochs=3",
        EAGER,
        with_callback(Poison),
        with_callback(Watch),
        with_callback(Interrupt),
    )
    Poison.doses = 1
    assert main(fit_arguments(checkpoint, tmp_path / "whole", *settings)) == 0
    assert Poison.doses == 0
    Poison.doses = 1
    monkeypatch.setattr(Interrupt, "at", ("on_train_epoch_end", 0))  # which the first try never reaches
    command = fit_arguments(checkpoint, tmp_path / "cut", *settings)
    with pytest.raises(Interrupted):
        main(command)
    assert Poison.doses == 0
    assert [path.name[:7] for path in (tmp_path / "cut" / "partial").iterdir()] == ["00000-1"]
    monkeypatch.setattr(Interrupt, "at", None)
    Watch.fresh()
    assert main(command) == 0
    assert len(Watch.rates) == 2  # trainings of this process: the second try of block 0, and block 1
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")


PLACES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]


@pytest.fixture(scope="module")
def sharded(make_checkpoint):
    return make_checkpoint(max_shard_size="1MB")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("settings", [(RTN,), (RTN, QUAROT)], ids=["plain", "rotated"])
def test_nan_and_inf_in_a_checkpoint_are_named(sharded, fit_arguments, tmp_path, capsys, name, value, settings):
    folder = shutil.copytree(sharded, tmp_path / "checkpoint")
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / shard, {"format": "pt"})
    capsys.readouterr()
    assert main(fit_arguments(folder, tmp_path / "run", *settings)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{folder / shard}: {name} holds NaN or inf" in error
    assert not (tmp_path / "run" / "model").exists()
