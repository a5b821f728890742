"""What a run logs while it runs, judged by what the run itself knows."""

import csv
import json
from typing import ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bisup_lightning.calibrate import epoch_log
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.model.theta import theta_by_kind
from callbacks.block_log import _append
from tests.tools import BISUP, RTN, with_callback

EPOCHS = 2


class Look(WalkCallback):
    """Keeps Θ of every block as each epoch leaves it."""

    seen: ClassVar[list[dict[str, list[torch.Tensor]]]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        kinds = theta_by_kind(pl_module.layer)
        Look.seen.append({kind: [value.detach().clone() for value in values] for kind, values in kinds.items()})


class Stop(WalkCallback):
    """Ends each block's training behind its first step, in the middle of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, *batch):
        trainer.should_stop = True


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value not in ("", "True", "False")} for row in csv.DictReader(file)]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def logged(checkpoint, fit, tmp_path):
    """A run with its loggers on, that learns two blocks for two epochs of two steps."""
    Look.seen.clear()
    return fit(checkpoint, tmp_path / "run", BISUP, f"--solver.epochs={EPOCHS}", "--trainer.logger=true", with_callback(Look))  # fmt: skip  # noqa: E501


def test_epochs_in_csv(logged):
    """Loss, the three rates along the cosine, speed, and Θ as the last epoch leaves it."""
    epochs = [row for index in range(2) for row in rows(logged / "logs" / f"{index:05d}" / "metrics.csv")]
    assert [row["epoch"] for row in epochs] == [0, 1, 0, 1]
    for row, theta in zip(epochs, Look.seen, strict=True):
        share = 1.0 if row["epoch"] == 0 else 0.5  # half of the cosine's way
        rates = {"clip": 1e-2, "smoothing": 2e-2, "low_rank": 1e-2}
        for kind, rate in rates.items():
            assert row[f"learning_rate/{kind}"] == pytest.approx(share * rate)
        assert row["tokens_per_second"] > 0
        assert "device_memory_gib" not in row  # on a CPU there is none
        assert theta.keys() == {"weight_clip", "activation_clip", "s1", "s2", "low_rank"}
        if row["epoch"] == 0:
            assert not any(name.startswith("theta/") for name in row)
            continue
        for kind, values in theta.items():
            flat = torch.cat([value.flatten() for value in values])
            logged_values = [row[f"theta/{kind}/{name}"] for name in ("min", "mean", "max")]
            expected = [flat.min().item(), flat.mean().item(), flat.max().item()]
            assert logged_values == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert epochs[1]["theta/low_rank/max"] > 0


def test_loggers_that_are_an_epoch_behind_hear_everything(checkpoint, fit, tmp_path, monkeypatch):
    more = (BISUP, f"--solver.epochs={EPOCHS}", "--trainer.logger=true")
    runs = [fit(checkpoint, tmp_path / "prompt", *more)]
    monkeypatch.setattr(epoch_log, "epochs_behind", lambda device: 1)
    runs.append(fit(checkpoint, tmp_path / "late", *more))
    for index in range(2):
        prompt, late = (rows(run / "logs" / f"{index:05d}" / "metrics.csv") for run in runs)
        assert [row.keys() for row in late] == [row.keys() for row in prompt]
        for name in ("epoch", "step", "loss", "learning_rate/clip"):
            assert [row[name] for row in late] == [row[name] for row in prompt]


def test_a_block_with_other_phases_stands_under_the_same_columns(checkpoint, fit, tmp_path):
    """As where one process ends what several have begun, or the other way round."""
    path = fit(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=1", "--trainer.logger=true") / "logs/blocks.csv"
    before = rows(path)
    figures = before[0] | {"index": 2.0, "seconds/wait": 7.0}
    del figures["seconds/read"]
    _append(path, figures)
    *others, last = rows(path)
    assert others == before
    assert last == {name: figures[name] for name in before[0] if name != "seconds/read"}


def test_training_that_ends_within_an_epoch_is_logged(checkpoint, fit, tmp_path):
    run = fit(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=2", "--trainer.logger=true", with_callback(Stop))
    for index in range(2):
        (row,) = rows(run / "logs" / f"{index:05d}" / "metrics.csv")
        assert (row["epoch"], row["step"]) == (0, 0)
        assert row["loss"] > 0


def test_blocks_in_csv_are_those_of_the_results(logged):
    blocks = json.loads((logged / "results.json").read_text(encoding="utf-8"))["blocks"]
    for row, block in zip(rows(logged / "logs" / "blocks.csv"), blocks, strict=True):
        assert {name: row[name] for name in row if name in block} == {
            name: value for name, value in block.items() if not isinstance(value, bool | dict)
        }
        assert {name: row[f"seconds/{name}"] for name in block["phases"]} == block["phases"]
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / block["seconds"])


def test_tensorboard_holds_what_the_results_hold(logged):
    blocks = json.loads((logged / "results.json").read_text(encoding="utf-8"))["blocks"]
    assert len(list((logged / "logs" / "blocks").iterdir())) == 1
    walk = EventAccumulator(str(logged / "logs" / "blocks")).Reload()
    losses = [(event.step, event.value) for event in walk.Scalars("block/loss_final")]
    assert losses == [(block["index"], pytest.approx(block["loss_final"], rel=1e-6)) for block in blocks]
    block = EventAccumulator(str(logged / "logs" / "00001")).Reload()
    wanted = {"loss", "tokens_per_second", "learning_rate/clip", "theta/s1/max"}
    assert wanted <= set(block.Tags()["scalars"])
    assert len(block.Scalars("loss")) == EPOCHS


@pytest.mark.parametrize(
    "settings", [(RTN, "--trainer.logger=true"), (BISUP, "--solver.epochs=1")], ids=["nothing-learned", "no-logger"]
)
def test_without_learning_or_logger_there_are_no_logs(checkpoint, fit, tmp_path, settings):
    assert not (fit(checkpoint, tmp_path / "run", *settings) / "logs").exists()


def test_clip_values_of_what_is_not_quantized_are_left_out(checkpoint, fit, tmp_path):
    """Weights alone are quantized: no clip value of an activation means anything."""
    Look.seen.clear()
    fit(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=1", "--precision.activations=null", "--solver.theta.smoothing=none", with_callback(Look))  # fmt: skip  # noqa: E501
    assert Look.seen[0].keys() == {"weight_clip", "low_rank"}
