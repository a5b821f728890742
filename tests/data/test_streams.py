"""Where streams live, which is chosen by what is free, and that a file behind them is real and leaves nothing."""

import errno
import os
from pathlib import Path

import pytest
import torch

from bisup_lightning.data import streams
from bisup_lightning.data.streams import StreamStorage, choose_place, free_host_bytes
from bisup_lightning.data.transfer import moved

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["host", "file"])
def test_a_tensor_holds_what_is_written(tmp_path, place, dtype):
    x_NTD = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    home = StreamStorage(place, CPU, tmp_path)
    y_NTD = home.copy(x_NTD)
    assert y_NTD.dtype == dtype
    assert torch.equal(y_NTD, x_NTD)
    y_NTD[1] = 0
    assert not torch.equal(y_NTD, x_NTD)
    assert torch.equal(home.hold(x_NTD), x_NTD)
    assert (home.hold(x_NTD) is x_NTD) == (place == "host")  # not copied where it lies already


def test_a_file_has_no_name_and_goes_with_its_tensor(tmp_path):
    home = StreamStorage("file", CPU, tmp_path)
    x = home.empty(torch.Size([1024, 1024]), torch.float32)
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text()  # the memory is a file's
    y = x[3:5]
    del x
    y[:] = 1
    assert y.sum() == 2048
    del y
    assert str(tmp_path) not in maps.read_text()


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    """Without room set aside, the process would die of SIGBUS when it writes to the mapped memory."""

    def full(descriptor, offset, size):
        assert size == 24
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        StreamStorage("file", CPU, tmp_path).empty(torch.Size([2, 3]), torch.float32)


@pytest.mark.parametrize(
    ("wanted", "free", "place"),
    [
        ("auto", 401, "host"), ("auto", 400, "file"), ("auto", None, "host"), ("host", 1, "host"),
        ("file", 10**9, "file"), ("device", 1, "host"),
    ],
)  # fmt: skip
def test_the_place_is_as_wanted_or_has_room_to_spare(monkeypatch, wanted, free, place):
    monkeypatch.setattr(streams, "free_host_bytes", lambda: free)
    assert choose_place(wanted, 100, CPU) == place


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:   4 kB\n"}, 4096),
        ({"meminfo": "MemAvailable: 4 kB\n", "memory.max": "max\n", "memory.stat": "anon 7\n"}, 4096),
        ({"meminfo": "MemAvailable: 4 kB\n", "memory.max": "3000\n", "memory.stat": "anon 500\nfile 9\n"}, 2500),
        ({"meminfo": "MemAvailable: 4 kB\n", "memory.max": "9000\n", "memory.stat": "anon 500\nfile 9\n"}, 4096),
        ({"meminfo": "of another kernel"}, None),
        ({}, None),
    ],
)
def test_free_memory_is_what_kernel_and_control_group_leave(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(streams, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(streams, "CGROUP", tmp_path)
    assert free_host_bytes() == free


def test_free_memory_of_this_machine():
    assert free_host_bytes() > 2**27


def test_batches_are_made_one_after_the_other_on_a_cpu():
    """Nothing is gained by making them ahead there, and a resumed loader counts those that were taken."""
    made = []

    def batches():
        for number in range(3):
            made.append(number)
            yield (torch.tensor([number]),)

    for number, (x,) in enumerate(moved(batches(), CPU)):
        assert x.item() == number
        assert made == list(range(number + 1))
