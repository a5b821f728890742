import errno

import pytest
import torch

from bisup_lightning import files
from bisup_lightning.cli import main
from bisup_lightning.files import sha256, write_json, write_tensors, write_text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(4)})
    before = path.read_bytes()

    def full(tensors, target, metadata=None):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, {"a": torch.arange(5)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_text_are_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    first = sha256(path)
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert sha256(path) != first
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails_at", [1, 3])  # `make faults` tries every operation
def test_a_full_disk_is_one_line_and_the_next_try_ends_as_if_nothing_had_been(
    fails_at, make_checkpoint, fit_arguments, tmp_path, monkeypatch, capsys
):
    """Two blocks and their streams, then the model: each write in turn meets a full disk."""
    checkpoint, rounding = make_checkpoint("llama"), "--config=configs/solver/rtn.yaml"
    assert main(fit_arguments(checkpoint, tmp_path / "whole", rounding)) == 0
    save, calls = files.save_file, []

    def fill_up(tensors, target, metadata=None):
        calls.append(target)
        if len(calls) == fails_at + 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        save(tensors, target, metadata=metadata)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fill_up)
        assert main(fit_arguments(checkpoint, tmp_path / "cut", rounding)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    assert not (tmp_path / "cut" / "model").exists()
    assert main(fit_arguments(checkpoint, tmp_path / "cut", rounding)) == 0
    whole, cut = ({p.name: sha256(p) for p in (tmp_path / d / "model").iterdir()} for d in ("whole", "cut"))
    assert cut == whole
