"""Runs of these tests draw no report.html, which takes a third of a small run; tests/report looks at it."""

import pytest

from bisup_lightning import cli
from tests.tools import Interrupt, Interrupted


@pytest.fixture(autouse=True, scope="package")
def without_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "write_report", lambda run_dir: None)
        yield


@pytest.fixture
def cut_off_and_resumed(monkeypatch):
    """Runs a command that has `Interrupt`, ends it inside the second block's training, and runs it again to its end."""

    def run(command):
        monkeypatch.setattr(Interrupt, "at", ("on_train_epoch_end", 1))
        with pytest.raises(Interrupted):
            cli.main(command)
        monkeypatch.setattr(Interrupt, "at", None)
        assert cli.main(command) == 0

    return run
