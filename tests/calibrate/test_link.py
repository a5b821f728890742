"""Messages between two processes, without a second one."""

import threading

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_message_that_can_not_be_sent_ends_the_process(monkeypatch, capfd):
    """Its peer waits for that message, and soon this process for its own."""
    ended = threading.Event()

    def end(code):
        assert code == 1
        ended.set()
        raise SystemExit  # of this thread

    def send(part, peer, group):
        raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more.")

    monkeypatch.setattr(link.os, "_exit", end)
    monkeypatch.setattr(link.dist, "send", send)
    monkeypatch.setattr(Ranks, "heard", lambda self, key: True)
    Link(1, None, torch.device("cpu"), Ranks(), "0-1").send(torch.ones(2, 3))
    assert ended.wait(10)
    assert capfd.readouterr().err == "error: hidden states could not be sent on: CUDA out of memory.\n"
