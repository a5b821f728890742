"""Each epoch is a new order of the same pairs, and the seed alone decides which."""

import pytest
import torch

from bisup_lightning.data.datamodule import BlockBatches
from bisup_lightning.data.layer_inputs import LayerInputs


def inputs(count):
    """Sequence n holds n everywhere in x_q, and −n in the target."""
    numbers_N = torch.arange(1.0, count + 1)
    x_q = numbers_N[:, None, None].expand(count, 3, 2).clone()
    return LayerInputs(-x_q, x_q, torch.device("cpu"), 4)


def epochs(count, batch_size, seed, number):
    loader = BlockBatches(inputs(count), batch_size, seed)
    return [list(loader) for _ in range(number)]


def order(epoch):
    return [int(x_TD[0, 0]) for x_BTD, _ in epoch for x_TD in x_BTD]


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3])])
def test_each_epoch_is_a_permutation_of_whole_pairs(count, batch_size, sizes):
    for epoch in epochs(count, batch_size, seed=0, number=3):
        assert sorted(order(epoch)) == list(range(1, count + 1))
        assert [len(x_BTD) for x_BTD, _ in epoch] == sizes
        for x_BTD, target_BTD in epoch:
            assert torch.equal(target_BTD, -x_BTD)


def test_lightning_is_told_the_number_of_batches():
    """The cosine schedule ends where the steps do."""
    for count, batch_size in ((10, 4), (8, 4), (3, 8)):
        loader = BlockBatches(inputs(count), batch_size, 0)
        assert len(loader) == len(list(loader))


def test_the_seed_decides_and_epochs_differ():
    first, again, other = ([order(e) for e in epochs(20, 4, seed, 4)] for seed in (5, 5, 6))
    assert first == again
    assert len({tuple(o) for o in first}) == 4
    assert first[0] != sorted(first[0])
    assert other[0] != first[0]


def test_the_global_random_state_has_no_say():
    torch.manual_seed(1)
    first = [order(e) for e in epochs(20, 4, 0, 2)]
    torch.manual_seed(2)
    assert [order(e) for e in epochs(20, 4, 0, 2)] == first


def test_batches_are_copies():
    """What a step does with its batch does not reach the streams."""
    streams = inputs(6)
    before = streams.q.clone(), streams.fp.clone()
    for x_BTD, target_BTD in BlockBatches(streams, 4, 0):
        x_BTD.zero_()
        target_BTD.zero_()
    assert torch.equal(streams.q, before[0])
    assert torch.equal(streams.fp, before[1])


@pytest.mark.parametrize("resumed_at", [0, 1, 2, 3])
def test_first_epochs_are_on_full_precision_inputs_and_the_others_on_what_came_meanwhile(resumed_at):
    streams, came = inputs(6), []

    def receive_final(into):
        came.append(len(came))
        into.q = 100 + into.q * 0 + torch.arange(6.0)[:, None, None]

    streams.early = 10 + streams.fp * 0 + torch.arange(6.0)[:, None, None]
    loader = BlockBatches(streams, 4, 0, 2, receive_final)
    loader.load_state_dict({"epoch": resumed_at, "position": 0})
    for epoch in range(resumed_at, 4):
        values = sorted(order(list(loader)))
        assert values == [(10 if epoch < 2 else 100) + number for number in range(6)]
        assert bool(came) == (epoch >= 2)
