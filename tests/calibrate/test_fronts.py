"""A wavefront's messages without processes: threads for stages, queues for links, a sum of what was seen for Θ."""

import copy
import queue
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from bisup_lightning.calibrate.link import Link
from bisup_lightning.calibrate.parallel import Front, Place, Ranks
from bisup_lightning.calibrate.schedule import Schedule
from bisup_lightning.calibrate.wavefront import Wavefront
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.share import PeerLost
from bisup_lightning.data.streams import Home

CPU = torch.device("cpu")
ROWS = 3  # sequences, each a step of every epoch


class Pipe(Link):
    """Delivers at once, to whoever takes it."""

    def __init__(self):
        super().__init__(0, None, CPU, Board(), "pipe")
        self.messages = queue.Queue()

    def send(self, x):
        self.messages.put(x.clone())
        delivered = Future()
        delivered.set_result(None)
        return delivered

    def receive(self):
        expected, x = next(self._expected), self.messages.get(timeout=20)
        assert x.shape == expected.shape
        return x


class Board(Ranks):
    """Announces one front, or none."""

    def __init__(self, front=-1):
        super().__init__(rank=1, world=2)
        object.__setattr__(self, "front", front)

    def heard(self, key):
        return key == f"front/{self.front}"


def learned(*seen):
    """A number that tells whatever was seen, and in which order."""
    return hash(seen) % 1_000_003 / 7.0


class Played:
    """A wavefront from a front on, saved at another.

    Args:
        schedule: Of its blocks.
        since: The time at which it goes on.
        saved: By block: Θ, epoch and state, as the run before saved them.
        front: The time at which all save themselves; -1 for never.
    """

    def __init__(self, schedule, since=0, saved=None, front=-1):
        self.schedule, self.since, self.before, self.front = schedule, since, saved or {}, front
        self.outputs, self.saved, self.errors = {}, {}, []
        self.pipes = [Pipe() for _ in range(schedule.stages)]
        threads = [threading.Thread(target=self.stage, args=(stage,)) for stage in range(schedule.stages)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors
        assert all(pipe.messages.empty() for pipe in self.pipes)

    def stage(self, stage):
        try:
            self.play(stage)
        except BaseException as error:
            self.errors.append(error)

    def play(self, stage):
        place = Place(self.schedule.stages, 1, stage, 0, upstream=self.pipes[stage - 1], downstream=self.pipes[stage])
        fp_NTD, prompt_1PD = torch.zeros(ROWS, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
        inputs = LayerInputs(fp_NTD, fp_NTD.clone(), CPU, 1, Home("host", CPU, Path()))
        relay = Wavefront(Front(self.schedule, self.since, {}), Board(self.front), place, fp_NTD, prompt_1PD)
        for block in relay.blocks(0, self.schedule.end):
            prompt_1PD = relay.receive_fp(block, inputs, prompt_1PD)
            assert inputs.fp[0].item() == block
            inputs.fp = torch.full_like(inputs.fp, block + 1)
            relay.send_fp(inputs, prompt_1PD)
            if not relay.is_finished(block):
                self.learn(relay, block, inputs)
        relay.close()

    def learn(self, relay, block, inputs):
        theta, epoch, done = 0.0, 0, 0
        if block in self.before:
            theta, epoch, state = copy.deepcopy(self.before[block])
            relay.load_state_dict(state)
            done = 1  # a front is behind an epoch's first step
        for now in range(epoch, self.schedule.epochs):
            relay.begin_epoch(now)
            for row in range(done, ROWS):
                theta = learned(theta, inputs.q[row].item(), now)
                relay.record(torch.tensor([row]), torch.full((1, 1, 1), theta, dtype=torch.float64))
                if row == 0 and relay.front(now, due=False):
                    self.saved[block] = copy.deepcopy((theta, now, relay.state_dict()))
            relay.end_epoch(now)
            done = 0
        relay.receive_final()
        self.outputs[block] = learned(theta, *inputs.q.flatten().tolist())
        inputs.q = torch.full_like(inputs.q, self.outputs[block])
        relay.send_final(inputs.q)


@pytest.mark.parametrize(("stages", "epochs"), [(2, 2), (2, 3), (2, 5), (3, 4), (4, 5), (5, 5)])
def test_a_wavefront_goes_on_from_any_front_as_if_nothing_had_been(stages, epochs):
    """And from a front that the resumed run saved, too."""
    schedule = Schedule(0, 2 * stages + 2, stages, epochs)
    whole = Played(schedule).outputs
    assert len(set(whole.values())) == schedule.end
    ahead = 0
    for time in range(1, schedule.length):
        saved = Played(schedule, front=time).saved
        assert sorted(saved) == schedule.learning_at(time)
        ahead += sum(len(state["ahead"]) for _, _, state in saved.values())
        later = min(time + stages + 1, schedule.length - 1)
        resumed = Played(schedule, time, saved, front=later)
        assert resumed.outputs == {block: whole[block] for block in resumed.outputs}
        if later > time:
            again = Played(schedule, later, resumed.saved)
            assert again.outputs == {block: whole[block] for block in again.outputs}
    assert (ahead > 0) == (stages < epochs)  # where final inputs are given before they are wanted


def test_what_cannot_be_delivered_is_an_error_for_all_behind_it():
    """So that nobody waits for a message that will never leave."""
    board = Board()
    link = Link(1, None, CPU, board, "broken")
    deliveries = [link.send(torch.zeros(2, 2)) for _ in range(3)]
    link.stop()
    for delivered in deliveries:
        with pytest.raises(PeerLost, match="ended"):
            delivered.result(timeout=5)
