"""A finished block is written beside the next one: in order, never in part, and an error on the disk is not lost."""

import errno
import os
import threading

import pytest

from bisup_lightning.calibrate.block_writer import BlockWriter
from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.cli import main
from tests.tools import RTN, Interrupt, Interrupted, contents, timeless, with_callback

PATIENCE = 30.0


class SlowStore:
    """Saves when it is let go; keeps what it saved, and fails at blocks of which it is told."""

    def __init__(self, broken=()):
        self.go, self.begun, self.saved, self.broken = threading.Event(), threading.Event(), [], broken

    def save_block(self, index, tensors, metrics, streams, theta):
        self.begun.set()
        assert self.go.wait(PATIENCE)
        if index in self.broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.saved.append(index)

    def save_partial(self, index, attempt, step, write):
        self.saved.append((index, step))


def later(event):
    timer = threading.Timer(0.2, event.set)
    timer.start()
    return timer


def test_a_block_is_saved_beside_what_follows_and_before_what_is_saved_next():
    store = SlowStore()
    writer = BlockWriter(store)
    writer.save_block(0, {}, {})
    assert store.begun.wait(PATIENCE)
    assert store.saved == []
    later(store.go)
    writer.save_partial(1, 0, 7, lambda path: None)
    assert store.saved == [0, (1, 7)]
    writer.save_block(1, {}, {})
    writer.close()
    assert store.saved == [0, (1, 7), 1]


def test_streams_are_saved_before_they_change():
    store = SlowStore()
    writer = BlockWriter(store)
    later(store.go)
    writer.save_block(0, {}, {}, {"x_fp": None})
    assert store.saved == [0]
    writer.close()


@pytest.mark.parametrize("following", ["save_block", "save_partial", "close"])
def test_a_failed_write_is_told_once_and_nothing_follows_it(following):
    store = SlowStore(broken=(0,))
    store.go.set()
    writer = BlockWriter(store)
    writer.save_block(0, {}, {})
    arguments = {"save_block": (1, {}, {}), "save_partial": (1, 0, 1, None), "close": ()}[following]
    with pytest.raises(OSError, match="No space left"):
        getattr(writer, following)(*arguments)
    writer.close()
    assert store.saved == []


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=3)


@pytest.fixture
def slow_disk(monkeypatch):
    """Blocks take a while to be saved; `slow_disk.broken` fails at one."""
    save_block = RunStore.save_block
    slow_disk = SlowStore()

    def slow(self, index, *arguments):
        assert threading.current_thread() is not threading.main_thread()
        threading.Event().wait(0.5)
        if index in slow_disk.broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_block(self, index, *arguments)

    monkeypatch.setattr(RunStore, "save_block", slow)
    return slow_disk


def test_an_exception_waits_for_the_write_under_way(slow_disk, monkeypatch, checkpoint, fit_arguments, tmp_path):
    command = fit_arguments(checkpoint, tmp_path / "cut", RTN, with_callback(Interrupt))
    monkeypatch.setattr(Interrupt, "at", ("on_block_start", 1))
    with pytest.raises(Interrupted):
        main(command)
    store = RunStore(tmp_path / "cut")
    assert list(store._read_manifest()[1])[2:] == ["blocks/00000/block.safetensors", "blocks/00000/metrics.json"]
    monkeypatch.setattr(Interrupt, "at", None)
    assert main(command) == 0
    assert main(fit_arguments(checkpoint, tmp_path / "whole", RTN, with_callback(Interrupt))) == 0
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("broken", [0, 2])
def test_a_disk_that_fails_ends_the_run_in_one_line(slow_disk, checkpoint, fit_arguments, tmp_path, capsys, broken):
    """Also where no block follows."""
    slow_disk.broken = (broken,)
    command = fit_arguments(checkpoint, tmp_path / "run", RTN)
    assert main(command) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert [path.name for path in sorted((tmp_path / "run").glob("blocks/*"))] == ["00000", "00001"][:broken]
    slow_disk.broken = ()
    assert main(command) == 0
