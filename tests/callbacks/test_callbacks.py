"""Who is told what, when, and how often; and what the four callbacks of base.yaml do at their moments."""

import csv
import io
import json
import shutil
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.parallel import Ranks
from bisup_lightning.cli import main
from bisup_lightning.data.share import WHOLE
from bisup_lightning.model.block import is_fused
from callbacks.bf16 import BF16
from callbacks.progress import WalkProgress
from tests.tools import BISUP, RTN, Foreign, Interrupt, Interrupted, Watch, contents, with_callback

EPOCHS, BATCHES = 2, 2  # eight sequences in batches of four
WALK = ("on_walk_start", "on_block_start", "on_block_end", "on_walk_end")
TRAINING = (
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_train_end",
    "on_fit_end", "on_validation_start", "on_test_start", "on_exception",
)  # fmt: skip


class Count(WalkCallback):
    """Writes down every event, and the block's number where the walk tells it."""

    events: ClassVar[list[str]] = []


def _heard(name):
    def hook(self, *arguments):
        if name == "on_block_start":
            Count.events.append(f"{name} {arguments[1]}")
        elif name == "on_block_end":
            Count.events.append(f"{name} {arguments[1].index}")
        else:
            Count.events.append(name)

    return hook


for _name in (*WALK, *TRAINING):
    setattr(Count, _name, _heard(_name))


class FusedAtTheEnd(WalkCallback):
    """Looks at the block at the start and at the end of its training."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    def on_train_start(self, trainer, pl_module):
        self.start = is_fused(pl_module.layer)

    def on_train_end(self, trainer, pl_module):
        self.seen.append((self.start, is_fused(pl_module.layer)))


@pytest.fixture(autouse=True)
def _fresh():
    for seen in (Count.events, FusedAtTheEnd.seen, Foreign.counts):
        seen.clear()
    Watch.fresh()


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


# --- order and count --------------------------------------------------------------------------------------------------


def training(epochs=EPOCHS):
    step = [
        "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
        "on_train_batch_end",
    ]  # fmt: skip
    epoch = ["on_train_epoch_start", *step * BATCHES, "on_train_epoch_end"]
    return ["on_fit_start", "on_train_start", *epoch * epochs, "on_train_end", "on_fit_end"]


def block(index, *inside):
    return [f"on_block_start {index}", *inside, f"on_block_end {index}"]


def test_events_of_a_trained_walk(checkpoint, fit, tmp_path):
    """The walk's events around Lightning's, a whole training for each block."""
    fit(checkpoint, tmp_path / "run", BISUP, f"--solver.epochs={EPOCHS}", with_callback(Count))
    assert Count.events == [
        "on_walk_start", *block(0, *training()), *block(1, *training()), "on_walk_end",
    ]  # fmt: skip


def test_events_of_a_walk_without_training(checkpoint, fit, tmp_path):
    fit(checkpoint, tmp_path / "run", RTN, with_callback(Count))
    assert Count.events == ["on_walk_start", *block(0), *block(1), "on_walk_end"]


def test_events_of_a_walk_that_goes_on(checkpoint, fit, tmp_path, monkeypatch):
    """What is finished is not told again, and a finished run tells nothing."""
    command = (BISUP, f"--solver.epochs={EPOCHS}", with_callback(Count), with_callback(Interrupt))
    monkeypatch.setattr(Interrupt, "at", ("on_block_start", 1))
    with pytest.raises(Interrupted):
        fit(checkpoint, tmp_path / "run", *command)
    monkeypatch.setattr(Interrupt, "at", None)
    Count.events.clear()
    fit(checkpoint, tmp_path / "run", *command)
    assert Count.events == ["on_walk_start", *block(1, *training()), "on_walk_end"]
    Count.events.clear()
    fit(checkpoint, tmp_path / "run", *command)
    assert Count.events == []


def test_a_walk_that_can_not_begin_ends(make_checkpoint, fit_arguments, tmp_path):
    """Whoever has opened something closes it."""
    folder = shutil.copytree(make_checkpoint(), tmp_path / "checkpoint")
    [weights] = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][:] = torch.inf
    save_file(tensors, weights, {"format": "pt"})
    assert main(fit_arguments(folder, tmp_path / "run", RTN, with_callback(Count))) == 2
    assert Count.events == ["on_walk_start", "on_walk_end"]


def test_an_error_in_training_reaches_on_exception(checkpoint, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(Interrupt, "at", ("on_train_end", 0))
    with pytest.raises(Interrupted):
        fit(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=1", with_callback(Count), with_callback(Interrupt))
    assert Count.events.count("on_exception") == 1
    assert "on_block_end 0" not in Count.events


def test_a_callback_of_lightning_begins_anew_with_every_block(checkpoint, fit, tmp_path):
    """As each block has a fresh Trainer: EarlyStopping's patience, say, is for one block."""
    assert not issubclass(Foreign, WalkCallback)
    assert issubclass(Foreign, Callback)
    fit(checkpoint, tmp_path / "run", BISUP, f"--solver.epochs={EPOCHS}", with_callback(Foreign))
    assert Foreign.counts == [EPOCHS * BATCHES] * 2


# --- Fuse -------------------------------------------------------------------------------------------------------------


def test_a_block_is_fused_when_its_training_ends(checkpoint, fit, tmp_path):
    fit(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=1", with_callback(FusedAtTheEnd))
    assert FusedAtTheEnd.seen == [(False, True)] * 2


def test_without_fuse_the_result_is_the_same(checkpoint, fit, tmp_path):
    """The callback says when; that it happens at all does not hang on it."""
    settings = (BISUP, "--solver.epochs=1")
    usual = fit(checkpoint, tmp_path / "usual", *settings)
    fewer = "--trainer.callbacks=[callbacks.bf16.BF16, callbacks.checkpoint.BlockCheckpoint]"
    bare = fit(checkpoint, tmp_path / "bare", *settings, fewer, with_callback(FusedAtTheEnd))
    assert FusedAtTheEnd.seen == [(False, False)] * 2
    assert contents(bare / "model") == contents(usual / "model")


# --- BF16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_bf16_chooses_by_device(device, dtype):
    walk = SimpleNamespace(model=SimpleNamespace(device=torch.device(device), dtype=torch.float16))
    BF16().on_walk_start(walk)
    assert walk.model.dtype is dtype


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_compute_in_float32_on_a_cpu_and_are_stored_as_the_checkpoint_was(
    make_checkpoint, fit, tmp_path, stored
):
    """Algorithm A1, lines 5 and 16; Θ is float32 throughout."""
    run = fit(make_checkpoint(dtype=stored), tmp_path / "run", BISUP, "--solver.epochs=1", with_callback(Watch))
    assert Watch.dtypes == [torch.float32] * 2
    for x_fp, x_q in Watch.streams:
        assert x_fp.dtype == x_q.dtype == torch.float32
    for learned in Watch.learned:
        assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    dtypes = set()
    for path in (run / "model").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            dtypes |= {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {dtype for dtype in dtypes if dtype.is_floating_point} == {stored}
    assert torch.uint8 in dtypes  # the packed codes


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_leaves_a_line_for_the_walk_and_each_block_off_a_terminal(checkpoint, fit, tmp_path, capsys):
    run = fit(checkpoint, tmp_path / "run", BISUP, f"--solver.epochs={EPOCHS}")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out
    lines = [line for line in captured.out.splitlines() if line.startswith("block")]
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]
    assert len(lines) == len(metrics) == 2
    assert captured.out.startswith("\n".join(["walking over 2 blocks", *lines, "measuring", ""]))
    for number, (line, entry) in enumerate(zip(lines, metrics, strict=True), start=1):
        assert line.startswith(f"block {number}/2 ")
        assert f"{entry['loss_initial']:.3e}" in line
        assert f"{entry['loss_final']:.3e}" in line
        assert ("kept its start" in line) is entry["kept_start"]


def test_progress_goes_on_counting_in_a_resumed_run(checkpoint, fit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Interrupt, "at", ("on_block_start", 1))
    with pytest.raises(Interrupted):
        fit(checkpoint, tmp_path / "run", RTN, with_callback(Interrupt))
    monkeypatch.setattr(Interrupt, "at", None)
    capsys.readouterr()
    fit(checkpoint, tmp_path / "run", RTN, with_callback(Interrupt))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block")]
    assert [line.split(" · ")[0] for line in lines] == ["block 2/2"]


def test_progress_gives_the_terminal_back():
    """The cursor hides while the line is live; it is back when the walk ends."""
    progress, text = WalkProgress(), io.StringIO()
    progress.console = Console(file=text, force_terminal=True, width=100)
    model = SimpleNamespace(num_layers=2, device=torch.device("cpu"))
    walk = SimpleNamespace(model=model, ranks=Ranks(), share=WHOLE)
    progress.on_walk_start(walk)
    progress.on_block_start(walk, 0)
    assert "\x1b[?25l" in text.getvalue()
    assert "\x1b[?25h" not in text.getvalue()
    progress.on_walk_end(walk)
    assert "\x1b[?25h" in text.getvalue()
    progress.on_walk_end(walk)  # once more does no harm


# --- logs -------------------------------------------------------------------------------------------------------------


def test_every_block_has_its_own_log_of_the_loss(checkpoint, fit, tmp_path):
    run = fit(checkpoint, tmp_path / "run", BISUP, f"--solver.epochs={EPOCHS}", "--trainer.logger=true")
    files = sorted((run / "logs").glob("*/metrics.csv"))
    assert len(files) == 2
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]
    for path, entry in zip(files, metrics, strict=True):
        with path.open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        assert len(losses) == EPOCHS
        assert entry["loss_final"] / 2 < losses[-1] < 2 * entry["loss_initial"]
    assert len(list((run / "logs").glob("0000?/events.out.tfevents*"))) == 2
