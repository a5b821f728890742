"""When blocks are compiled."""

from types import SimpleNamespace

import pytest
import torch

from bisup_lightning.calibrate.job import compiles
from bisup_lightning.model.blockwise import BlockwiseModel
from tests.inputs import DEMO


@pytest.fixture(scope="module")
def demo():
    return BlockwiseModel(DEMO, torch.device("cpu"), torch.float32)


def asked(compile_, tokens):
    return SimpleNamespace(compile=compile_, data=SimpleNamespace(num_samples=1, seq_len=tokens))


def test_a_pass_over_much_text_pays(demo):
    weights = sum(
        parameter.numel() for _, layer in demo.layers() for parameter in layer.parameters()
    )  # operations of a token are twice as many
    pays = 2e15 / (2 * weights)
    assert not compiles(asked("auto", int(0.99 * pays)), demo)
    assert compiles(asked("auto", int(1.01 * pays)), demo)


def test_what_is_asked_for_is_done(demo):
    assert compiles(asked("always", 1), demo)
    assert not compiles(asked("never", 10**15), demo)


def test_deterministic_algorithms_are_not_compiled_unless_asked_for(demo):
    torch.use_deterministic_algorithms(True)
    try:
        assert not compiles(asked("auto", 10**15), demo)
        assert compiles(asked("always", 10**15), demo)
    finally:
        torch.use_deterministic_algorithms(False)
