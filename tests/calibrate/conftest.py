"""Runs of these tests draw no report.html, which takes a third of a small run; tests/report looks at it."""

import pytest

from bisup_lightning import cli


@pytest.fixture(autouse=True, scope="package")
def without_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "write_report", lambda run_dir: None)
        yield
