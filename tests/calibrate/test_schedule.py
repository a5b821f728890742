"""The wavefront's time table against the formula, and against a walk of processes that wait for each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisup_lightning.calibrate.schedule import Schedule


@st.composite
def schedules(draw):
    epochs = draw(st.integers(1, 7))
    first = draw(st.integers(0, 3))
    return Schedule(first, first + draw(st.integers(1, 20)), draw(st.integers(1, epochs)), epochs)


def start_by_the_formula(schedule, block):
    """start(b) = max(start(b−1) + 1, start(b−K) + E)."""
    if block == schedule.first:
        return 0
    candidates = [start_by_the_formula(schedule, block - 1) + 1]
    if block - schedule.stages >= schedule.first:
        candidates.append(start_by_the_formula(schedule, block - schedule.stages) + schedule.epochs)
    return max(candidates)


@given(schedules())
def test_blocks_start_by_the_formula(schedule):
    short = Schedule(schedule.first, min(schedule.end, schedule.first + 9), schedule.stages, schedule.epochs)
    for block in range(short.first, short.end):
        assert short.start(block) == start_by_the_formula(short, block)


@given(schedules())
def test_every_version_is_given_just_before_it_is_taken(schedule):
    """The final one, too, but it may be taken later; by the last epoch alone, unless nothing else learns meanwhile."""
    for block in range(schedule.first + 1, schedule.end):
        taken = [schedule.version(block, epoch) for epoch in range(schedule.epochs)]
        assert taken == sorted(taken)
        assert taken[-1] == schedule.final
        assert schedule.versions(block) == sorted(set(taken))
        for version in set(taken):
            given_at = schedule.start(block - 1) + version  # known at the end of that tick
            taken_at = schedule.start(block) + taken.index(version)
            assert taken_at == given_at + 1 or (version == schedule.final and taken_at > given_at + 1)
        assert schedule.stages == 1 or taken.count(schedule.final) == 1
        for since in range(schedule.length):
            expected = [version for version in schedule.versions(block) if schedule.start(block - 1) + version >= since]
            assert schedule.versions(block, since) == expected


@given(schedules())
def test_a_stage_learns_one_block_at_a_time(schedule):
    blocks = sorted(block for stage in range(schedule.stages) for block in schedule.blocks_of(stage))
    assert blocks == list(range(schedule.first, schedule.end))
    for time in range(schedule.length):
        learning = schedule.learning_at(time)
        assert len({schedule.stage_of(block) for block in learning}) == len(learning)
        finished = schedule.finished_at(time)
        assert all(block < finished or block in learning or schedule.start(block) > time for block in blocks)
    assert schedule.finished_at(schedule.length) == schedule.end


def test_one_stage_is_the_plain_walk():
    """Every epoch of every block sees the fused predecessor."""
    schedule = Schedule(0, 6, 1, 5)
    assert [schedule.start(block) for block in range(6)] == [0, 5, 10, 15, 20, 25]
    assert {schedule.version(block, epoch) for block in range(6) for epoch in range(5)} == {4}


@pytest.mark.parametrize(("stages", "length"), [(1, 160), (2, 81), (4, 43), (5, 36)])
def test_thirty_two_blocks_take_this_long(stages, length):
    """In epochs, 160 of them are trained: written out by hand for 4 stages, 7 rounds of 5, then 3 stages' delay + 5."""
    assert Schedule(0, 32, stages, 5).length == length
