"""Checkpoints of the models that transforms are tried on, each made once."""

import pytest

from tests.transform.models import MODELS


@pytest.fixture(scope="session")
def checkpoint_of(make_checkpoint):
    """The folder of one of MODELS."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            kind, overrides = MODELS[name]
            folders[name] = make_checkpoint(kind, **{"vocab_size": 64, **overrides})
        return folders[name]

    return folder_of
