"""A run may end anywhere: the same command goes on, and what it leaves are the bytes of a run that never stopped."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from bisup_lightning.calibrate import measure
from bisup_lightning.cli import main
from tests.faults import flip, truncate
from tests.processes import Run
from tests.tools import (
    BISUP,
    EAGER,
    QUAROT,
    RTN,
    CutOff,
    Interrupt,
    Interrupted,
    Watch,
    contents,
    cut_off,
    timeless,
    traces,
    with_callback,
)  # fmt: skip

SETTINGS = (BISUP, "--solver.epochs=3", with_callback(Watch), with_callback(Interrupt))
LAST = 2
PLACES = [
    ("on_block_start", 0),
    ("on_train_epoch_end", 0),
    ("on_block_end", 0),
    ("on_block_start", 1),
    ("on_train_epoch_end", 1),
    ("on_train_end", LAST),
    ("on_block_end", LAST),
    ("on_walk_end", -1),
]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=LAST + 1)


@pytest.fixture
def command(fit_arguments, checkpoint, tmp_path):
    return fit_arguments(checkpoint, tmp_path / "run", *SETTINGS)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def undisturbed(request, fit_arguments, checkpoint, tmp_path_factory):
    """What a run gives that nothing disturbs; made once for each checkpoint, which is made anew in another turn."""
    made = request.module.__dict__.setdefault("_undisturbed", {})
    if checkpoint not in made:
        made[checkpoint] = tmp_path_factory.mktemp("undisturbed") / "run"
        assert main(fit_arguments(checkpoint, made[checkpoint], *SETTINGS)) == 0
    return made[checkpoint]


def interrupt(monkeypatch, command, place):
    monkeypatch.setattr(Interrupt, "at", place)
    with pytest.raises(Interrupted):
        main(command)
    monkeypatch.setattr(Interrupt, "at", None)


def assert_same_run(run, undisturbed):
    assert contents(run / "model") == contents(undisturbed / "model")
    assert timeless(run) == timeless(undisturbed)
    assert contents(run).keys() == contents(undisturbed).keys()  # and nothing lies about


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(monkeypatch, command, run, undisturbed, place):
    interrupt(monkeypatch, command, place)
    assert not (run / "results.json").exists()
    Watch.fresh()
    assert main(command) == 0
    assert_same_run(run, undisturbed)
    event, block = place
    first = {"on_block_end": block + 1, "on_walk_end": LAST + 1}.get(event, block)  # what is finished is not done again
    assert [result.index for result in Watch.results] == list(range(first, LAST + 1))


def test_a_run_may_be_cut_off_again_and_again(monkeypatch, command, run, undisturbed):
    for place in (("on_train_epoch_end", 0), ("on_block_end", 0), ("on_train_end", 1), ("on_block_start", 2)):
        interrupt(monkeypatch, command, place)
    assert main(command) == 0
    assert_same_run(run, undisturbed)


def test_a_run_that_was_cut_off_while_it_was_measured_ends_in_the_same_bytes(monkeypatch, command, run, undisturbed):
    def fail(*arguments, **settings):
        raise Interrupted("while measuring")

    with monkeypatch.context() as patch:
        patch.setattr("bisup_lightning.evaluate.metrics.LanguageModelMetrics.update", fail)
        with pytest.raises(Interrupted):
            main(command)
    Watch.fresh()
    assert main(command) == 0
    assert not Watch.results
    assert_same_run(run, undisturbed)


def test_a_run_that_was_killed_ends_in_the_same_bytes(command, run, undisturbed):
    """SIGKILL inside a block: no handler, no clean-up. `make faults` does it a few hundred times."""
    code, _ = Run(command, environment={"INTERRUPT_AT": "on_train_epoch_end:1"}).wait()
    assert code == -signal.SIGKILL
    assert main(command) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_training_goes_on_at_the_step_where_it_was_saved(fit_arguments, make_checkpoint, tmp_path):
    """Cut off at a step, then at every one or two steps in one run; saved behind each."""
    checkpoint = make_checkpoint(num_hidden_layers=2)

    def command(run):  # 8 sequences: 3 steps an epoch, 9 a block
        more = ("--data.batch_size=3", EAGER, with_callback(CutOff))
        return fit_arguments(checkpoint, tmp_path / run, BISUP, "--solver.epochs=3", *more)

    assert main(command("whole")) == 0
    whole = contents(tmp_path / "whole" / "model")
    for step in (1, 2, 3, 4, 9, 10, 17):
        cut_off(command(f"at-{step}"), step)
        CutOff.steps_made = 0
        assert main(command(f"at-{step}")) == 0
        assert contents(tmp_path / f"at-{step}" / "model") == whole, step
        saved = step - (step % 3 == 0)  # not behind an epoch's last step
        assert CutOff.steps_made == 18 - saved
    for steps in [1, 2] * 4:
        cut_off(command("often"), steps)
    assert main(command("often")) == 0
    assert contents(tmp_path / "often" / "model") == whole


def test_what_a_write_left_half_done_is_no_hindrance(monkeypatch, command, run, undisturbed):
    """Files and folders that were being written when the power went."""
    interrupt(monkeypatch, command, ("on_block_start", 1))
    for folder in ("blocks/00001.tmp", "blocks/00001", "model.tmp", "model", "streams", "partial"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        for name in ("block.safetensors", "metrics.json", "config.json"):
            (run / folder / name).write_bytes(b"half")
    for file in ("streams/00001.safetensors", "partial/00001-0-000001.ckpt", "manifest.json.tmp", "results.json.tmp"):
        (run / file).write_bytes(b"half")
    assert main(command) == 0
    assert_same_run(run, undisturbed)


DAMAGED = {
    "config.yaml": flip,
    "tokens.safetensors": truncate,
    "blocks/00000/block.safetensors": flip,
    "blocks/00000/metrics.json": Path.unlink,
    "streams/00001.safetensors": truncate,
    "partial/00001-0-000003.ckpt": flip,
}


@pytest.fixture
def eager(monkeypatch, command):
    """The command that saves all that can be saved, behind a run that was cut off inside block 1."""
    command = [*command, EAGER, *(with_callback(kind) for kind in (Watch, Interrupt))]
    interrupt(monkeypatch, command, ("on_train_epoch_end", 1))
    return command


def test_damage_is_mended_and_never_built_upon(eager, run, undisturbed, caplog, tmp_path):
    for place, (name, damage) in enumerate(DAMAGED.items()):
        copy = shutil.copytree(run, tmp_path / f"copy-{place}")
        damage(copy / name)
        caplog.clear()
        assert main([*eager, f"--run_dir={copy}"]) == 0
        assert caplog.messages[0].startswith(f"run_dir: {copy / name} is missing or damaged")
        assert_same_run(copy, undisturbed)


def test_without_its_streams_a_run_goes_on_from_its_blocks(eager, run, undisturbed):
    """Without the streams, the finished block is only run through; the block at hand goes on where it stopped."""
    truncate(run / "streams" / "00001.safetensors")
    Watch.fresh()
    assert main([*eager, with_callback(CutOff)]) == 0
    assert [result.index for result in Watch.results] == [1, 2]
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(
    "name", ["model/model-00001.safetensors", "model/config.json", "model/tokenizer.json", "model/README.md"]
)
def test_a_damaged_model_is_put_together_again(command, run, undisturbed, name):
    shutil.copytree(undisturbed, run)  # which copies what was linked
    flip(run / name)
    Watch.fresh()
    assert main(command) == 0
    assert not Watch.results  # from the finished blocks
    assert_same_run(run, undisturbed)


def test_lost_results_are_measured_again(command, run, undisturbed):
    shutil.copytree(undisturbed, run)
    flip(run / "results.json")
    before = contents(run / "blocks")
    assert main(command) == 0
    assert contents(run / "blocks") == before
    assert_same_run(run, undisturbed)


def test_what_is_measured_may_change_until_it_is(checkpoint, fit_arguments, tmp_path, monkeypatch, capsys):
    """No block is lost to a mistake in it: a batch too large, a text that must be mended."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("One two three four. " * 100)
    settings = (RTN, f"--evaluation.perplexity=[{text}]")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "evaluate", full)
        assert main(fit_arguments(checkpoint, run, *settings, "--evaluation.batch_size=64")) == 2
        assert "evaluation.batch_size" in capsys.readouterr().err
        assert main(["predict", f"--run_dir={run}", "--text=One", "--max_new_tokens=2", "--accelerator=cpu"]) == 0
    before = contents(run / "blocks") | contents(run / "model")
    text.write_text("Five six seven eight. " * 100)
    assert main(fit_arguments(checkpoint, run, *settings, "--evaluation.batch_size=2")) == 0
    assert contents(run / "blocks") | contents(run / "model") == before
    whole = tmp_path / "whole"
    assert main(fit_arguments(checkpoint, whole, *settings, "--evaluation.batch_size=2")) == 0
    assert timeless(run) == timeless(whole)
    assert (run / "config.yaml").read_text() == (whole / "config.yaml").read_text().replace(str(whole), str(run))


def test_what_was_measured_is_not_replaced(command, run, undisturbed, capsys):
    shutil.copytree(undisturbed, run)
    before = traces(run)
    assert main([*command, "--evaluation.batch_size=2"]) == 2
    assert "evaluation.batch_size: 8 → 2; main.py test measures what it made anew" in capsys.readouterr().err
    assert traces(run) == before


def test_a_finished_run_gets_back_what_others_need_of_it(command, run, undisturbed, capsys):
    """`test` reads config.yaml; a lost block costs nothing, as its tensors are in the model."""
    shutil.copytree(undisturbed, run)
    config = (run / "config.yaml").read_text()
    flip(run / "config.yaml")
    (run / "blocks" / "00000" / "metrics.json").unlink()
    Watch.fresh()
    assert main(command) == 0
    assert not Watch.results
    assert (run / "config.yaml").read_text() == config.replace(str(undisturbed), str(run))
    assert contents(run / "model") == contents(undisturbed / "model")
    capsys.readouterr()
    before = traces(run)
    assert main(command) == 0
    assert traces(run) == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_manifest_is_refused(command, run, undisturbed, capsys, damage):
    shutil.copytree(undisturbed, run)
    damage(run / "manifest.json")
    before = traces(run)
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "manifest.json is damaged" in error
    assert traces(run) == before


def test_a_finished_run_returns_at_once_and_touches_nothing(command, run, capsys):
    assert main(command) == 0
    first = capsys.readouterr().out
    before, results = traces(run), (run / "results.json").read_bytes()
    Watch.fresh()
    assert main(command) == 0
    again = capsys.readouterr().out
    assert traces(run) == before
    assert (run / "results.json").read_bytes() == results
    assert not Watch.dtypes  # no block was even opened
    assert "block" not in again
    assert first.endswith(again)  # the same table


def test_a_run_that_was_cut_off_when_it_had_just_finished_drops_its_streams(command, run, undisturbed):
    """The streams were to be dropped next, and are the largest files of all."""
    shutil.copytree(undisturbed, run)
    for name in ("streams/00003.safetensors", "partial/00002-0-000005.ckpt"):
        (run / name).parent.mkdir()
        (run / name).write_bytes(b"large")
    assert main(command) == 0
    assert_same_run(run, undisturbed)


def test_a_finished_run_can_move(command, run, undisturbed, tmp_path):
    """Nothing in it names its own place."""
    moved = shutil.copytree(undisturbed, tmp_path / "moved")
    before = traces(moved)
    assert main([*command, f"--run_dir={moved}"]) == 0
    assert traces(moved) == before


def test_a_finished_run_leaves_no_streams(undisturbed):
    """They are the largest files of a run, and only resuming needs them."""
    assert not list(undisturbed.glob("streams*"))
    assert not list(undisturbed.rglob("*.tmp"))


# --- another run ------------------------------------------------------------------------------------------------------


CHANGES = {
    "--seed=5": "seed: 0 → 5",
    "--solver.epochs=4": "solver.init_args.epochs: 3 → 4",
    "--precision.kv=null": "precision.kv",
    QUAROT: "QuaRot",
}


@pytest.mark.parametrize("when", ["unfinished", "finished"])
def test_a_changed_configuration_is_refused(monkeypatch, command, run, undisturbed, capsys, when):
    if when == "unfinished":
        interrupt(monkeypatch, command, ("on_block_start", 1))
    else:
        shutil.copytree(undisturbed, run)
    before = traces(run)
    for argument, words in CHANGES.items():
        capsys.readouterr()
        assert main([*command, argument]) == 2
        assert words in capsys.readouterr().err
        assert traces(run) == before
    assert main(command) == 0  # and the old one still goes on
    assert_same_run(run, undisturbed)


def change_weights(checkpoint, text):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def change_configuration(checkpoint, text):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    return path


def change_tokenizer(checkpoint, text):
    """Two words change places: every token of the text may be another one."""
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return path


def change_text(checkpoint, text):
    text.write_text(text.read_text().replace(" ", "  ", 1))
    return text


@pytest.mark.parametrize("change", [change_weights, change_configuration, change_tokenizer, change_text])
def test_a_changed_input_is_refused_by_its_name(
    monkeypatch, checkpoint, fit_arguments, text_file, run, tmp_path, capsys, change
):
    model, text = shutil.copytree(checkpoint, tmp_path / "model"), shutil.copy(text_file, tmp_path / "text.txt")
    command = fit_arguments(model, run, *SETTINGS, f"--data.calibration={text}")
    interrupt(monkeypatch, command, ("on_block_start", 1))
    path = change(model, text)
    before = traces(run)
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert path.name in error
    assert len(error.splitlines()) == 1
    assert traces(run) == before


def test_what_does_not_change_the_result_may_change(monkeypatch, command, run, undisturbed, checkpoint, tmp_path):
    """Loggers, and where the same model lies."""
    interrupt(monkeypatch, command, ("on_block_start", 1))
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert main([*command, f"--checkpoint={moved}", "--trainer.logger=true"]) == 0
    assert contents(run / "model") == contents(undisturbed / "model")
    assert list((run / "logs").rglob("*.csv"))
