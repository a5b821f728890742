"""The simulator agrees with plain arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.wavefront import play

BLOCK = 1 + 5 * 3 + 2  # forward passes: full precision, five epochs, outputs and the start's loss
LINK = 3 + 1 / 8 + 1  # between one block's final outputs and the next one's: an epoch, a sample, the outputs


def test_one_stage_computes_one_block_after_another():
    played = play(8, 1, 2.0, 1e9, 1e9)
    assert played.seconds == pytest.approx(8 * BLOCK * 2.0)
    assert played.busy == pytest.approx(1.0)
    assert played.bytes_sent == 0


def test_what_members_do_not_divide_comes_to_each_block():
    assert play(8, 1, 2.0 / 4, 1e9, 1e9, undivided=3.0).seconds == pytest.approx(8 * (BLOCK * 2.0 / 4 + 3.0))


@given(blocks=st.integers(1, 60), stages=st.integers(2, 6), travel=st.floats(0, 2))
def test_a_wavefront_is_held_up_by_its_stages_or_by_its_chain_and_by_nothing_else(blocks, stages, travel):
    """finished(b) = max(finished(b−1) + travel, own four epochs) + an epoch, the sample and the outputs."""
    seconds = play(blocks, stages, 1.0, travel, 1.0).seconds
    begun, finished = [], []
    for block in range(blocks):
        free = finished[block - stages] + 1 if block >= stages else 0.0
        begun.append(max(free, begun[-1] + 1 + travel) if block else 0.0)
        waited = finished[-1] + travel if block else 0.0
        finished.append(max(begun[-1] + 1 + 4 * 3, waited) + LINK)
    assert seconds == pytest.approx(max(finished) + 1)


@pytest.mark.parametrize(
    ("stages", "period"), [(2, (BLOCK + 1 / 8) / 2), (4, (BLOCK + 1 / 8) / 4), (5, LINK), (8, LINK)]
)
def test_in_the_long_run_a_block_takes_its_part_of_the_stages_or_a_link_of_the_chain(stages, period):
    assert play(4000, stages, 1.0, 0.0, 1.0).seconds / 4000 == pytest.approx(period, rel=0.01)


def test_independent_blocks_wait_for_full_precision_inputs_alone():
    """With a stage for each block: the passes of all blocks, then what is left of the last one."""
    played = play(10, 10, 1.0, 7.0, 1e30, independent=True)
    assert played.seconds == pytest.approx(10 + 5 * 3 + 2)
    assert played.bytes_sent == 9 * 7.0 / 10


def test_a_wavefront_sends_a_target_and_final_outputs_for_each_block_but_the_last():
    assert play(3, 2, 1.0, 7.0, 1.0).bytes_sent == 2 * 2 * 7.0 / 2
