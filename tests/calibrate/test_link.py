"""Messages between two processes, without a second one."""

import pytest
import torch

from bisup_lightning.calibrate import link
from bisup_lightning.calibrate.link import Link
from bisup_lightning.calibrate.parallel import Ranks


def test_a_message_that_there_is_no_memory_for_is_still_to_come(monkeypatch):
    """Who receives it computes half as many sequences at a time from then on, and asks again."""
    sent = iter([torch.full((2, 3), 1.0), torch.full((4,), 2.0)])
    monkeypatch.setattr(link.dist, "recv", lambda part, peer, group: part.copy_(next(sent)))
    receiving = Link(1, None, torch.device("cpu"), Ranks(), "1-0")
    receiving.expect(torch.empty(shape, device="meta") for shape in ((2, 3), (4,)))
    with monkeypatch.context() as full:

        def empty_like(*arguments, **more):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        full.setattr(torch, "empty_like", empty_like)
        with pytest.raises(torch.OutOfMemoryError):
            receiving.receive()
    assert torch.equal(receiving.receive(), torch.full((2, 3), 1.0))
    assert torch.equal(receiving.receive(), torch.full((4,), 2.0))
