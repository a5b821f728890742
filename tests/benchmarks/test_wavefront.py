"""The simulator agrees with the time table where passes cost nothing, and with plain arithmetic for one GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import wavefront
from benchmarks.wavefront import play
from bisup_lightning.calibrate.schedule import Schedule


def test_one_stage_computes_one_block_after_another():
    played = play(Schedule(0, 8, 1, 5), 2.0, 1e9, 1e9)
    assert played.seconds == pytest.approx(8 * (1 + 5 * 3 + 2) * 2.0)
    assert played.busy == pytest.approx(1.0)


@given(st.integers(1, 40), st.integers(1, 5))
def test_without_passes_it_takes_as_many_epochs_as_the_time_table(blocks, stages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wavefront, "PASS", 0.0)
        schedule = Schedule(0, blocks, stages, 5)
        assert play(schedule, 1 / 3, 0.0, 1.0).seconds == pytest.approx(schedule.length)


def test_a_block_needs_an_epoch_a_sample_and_a_pass_behind_its_predecessors_final_outputs():
    """With as many stages as epochs, nothing else holds a wavefront up."""
    played = play(Schedule(0, 4000, 5, 5), 1.0, 0.0, 1.0).seconds / 4000
    assert played == pytest.approx(3 + 2 / 8 + 1, rel=0.01)


@pytest.mark.parametrize(("stages", "speed_up"), [(2, 1.95), (4, 3.75)])
def test_some_stages_are_nearly_as_many_times_as_fast(stages, speed_up):
    one, several = (play(Schedule(0, 80, k, 5), 1.0, 0.0, 1.0).seconds for k in (1, stages))
    assert one / several > speed_up


def test_independent_blocks_wait_for_full_precision_inputs_alone():
    """With a stage for each block: the passes of all blocks, then what is left of the last one."""
    played = play(Schedule(0, 10, 10, 5), 1.0, 7.0, 1e30, independent=True)
    assert played.seconds == pytest.approx(10 + 5 * 3 + 2)
    assert played.bytes_sent == 9 * 7.0 / 10


def test_every_version_that_is_trained_on_is_sent_once():
    schedule = Schedule(0, 3, 2, 5)
    assert [schedule.versions(block) for block in (1, 2)] == [[0, 1, 2, 3, 4], [3, 4]]
    assert play(schedule, 1.0, 7.0, 1.0).bytes_sent == 7.0 * ((1 + 5) + (1 + 2)) / 2
