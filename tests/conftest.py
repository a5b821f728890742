"""The inputs of `tests.inputs`, made once and shared."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bisup_lightning.cli import main
from tests.inputs import fit_command, write_checkpoint, write_text


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`make_checkpoint("qwen2", dtype=torch.bfloat16, max_shard_size="100KB", hidden_size=80, …)`: a folder."""

    def make(model_type: str = "llama", **settings) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **settings)

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some English-looking text of about twelve thousand tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def fit_arguments(text_file) -> Callable[..., list[str]]:
    """Arguments of a `fit` that takes seconds: `fit_arguments(checkpoint, run_dir, "--solver.epochs=1", …)`."""

    def arguments(checkpoint: Path, run_dir: Path, *more: str) -> list[str]:
        return fit_command(checkpoint, run_dir, text_file, *more)

    return arguments


@pytest.fixture
def fit(fit_arguments) -> Callable[..., Path]:
    """Runs such a `fit`, which must succeed, and returns the run directory."""

    def run(checkpoint: Path, run_dir: Path, *more: str) -> Path:
        assert main(fit_arguments(checkpoint, run_dir, *more)) == 0
        return run_dir

    return run
