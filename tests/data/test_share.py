"""Members of a share hold disjoint parts of every batch, and find together what one process finds."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from bisup_lightning.data.datamodule import BlockBatches
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.share import Share
from tests.ranks import together

CPU = torch.device("cpu")


def streams(count):
    """Sequence n holds n everywhere."""
    return torch.arange(float(count))[:, None, None].expand(count, 2, 3).clone()


def order(x_N, batch_size, share, epochs=2):
    """Sequences of each batch of the epochs."""
    own = share.of(x_N, batch_size)
    loader = BlockBatches(LayerInputs(own, own, CPU, batch_size, share=share), batch_size, 5)
    return [[int(x_TD[0, 0]) for x_TD in x_BTD] for _ in range(epochs) for x_BTD, _ in loader]


@given(lanes=st.integers(1, 4), members=st.integers(1, 4), batches=st.integers(1, 5))
def test_parts_of_the_members_make_up_the_batches_of_one_process(lanes, members, batches):
    batch_size = lanes * members
    x_N = streams(batch_size * batches)
    whole = order(x_N, batch_size, Share())
    parts = [order(x_N, batch_size, Share(member, members)) for member in range(members)]
    for number, batch in enumerate(whole):
        assert batch == [sequence for part in parts for sequence in part[number]]  # in the same order, too


@given(count=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_every_batch_takes_one_sequence_of_each_lane(count, batch_size):
    batches = order(streams(count), batch_size, Share(), epochs=1)
    assert sorted(sequence for batch in batches for sequence in batch) == list(range(count))
    assert [len(batch) for batch in batches] == [len(part) for part in torch.arange(count).split(batch_size)]
    for batch in batches:
        assert [sequence % batch_size for sequence in batch] == list(range(len(batch)))


def messages(rank, world):
    share = Share(rank, world, None)
    sums = [torch.tensor([1.0 + rank, 2.0]), torch.tensor(10.0**rank)]
    share.sum_(sums)
    largest = [torch.tensor([float(rank), -float(rank)])]
    share.max_(largest)
    whole, sent, gather = streams(4 * world), [], dist.gather
    dist.gather = lambda x, *more, **settings: sent.append(len(x)) or gather(x, *more, **settings)
    gathered = share.gather(share.of(whole, 2 * world), 2 * world)
    assert sent == [2, 2]  # in parts, one for each batch
    votes = [share.agree(rank == leader, CPU) for leader in (0, 1)]
    inputs = LayerInputs(share.of(whole, 2 * world), share.of(whole + 1, 2 * world), CPU, 1, share=share)
    figures = inputs.mean_square_target(), inputs.loss_q(lambda x_BTD: x_BTD), inputs.num_tokens
    return [s.tolist() for s in sums], largest[0].tolist(), gathered, votes, figures


@pytest.mark.parametrize("world", [2, 4])
def test_members_add_up_what_they_found(tmp_path, world):
    whole = streams(4 * world)
    for rank, (sums, largest, gathered, votes, figures) in enumerate(together(world, tmp_path, messages)):
        assert sums == [[sum(1.0 + r for r in range(world)), 2.0 * world], sum(10.0**r for r in range(world))]
        assert largest == [world - 1.0, 0.0]
        assert gathered is None if rank else torch.equal(gathered, whole)
        assert votes == [True, False]  # the first one decides
        assert figures == (pytest.approx(whole.square().mean().item()), pytest.approx(1.0), whole.shape[0] * 2)


def lose_a_peer(rank, world):
    if rank == 1:
        return "gone"
    try:
        Share(rank, world, None).sum_([torch.zeros(1)])
    except RuntimeError as error:
        return type(error).__name__
    return "nothing was noticed"


def test_a_peer_that_is_gone_is_an_error_of_its_own(tmp_path):
    assert together(2, tmp_path, lose_a_peer) == ["PeerLost", "gone"]
