"""The speed-up of several processes over one, from when blocks were saved."""

import json
import os
import re

import pytest

from benchmarks.several import COMPILING, PHASES, main, metrics_of, pace
from tests.inputs import ROOT

TINY = (
    "--shape=tiny", "--gpus=2", "--blocks=8", "--blocks_alone=7", "--data.seq_len=16", "--data.num_samples=4",
    "--data.batch_size=2", "--solver.epochs=2", "--compile=never",
)  # fmt: skip


def saved(run_dir, times):
    for index, at in enumerate(times):
        file = metrics_of(run_dir, index)
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"phases": dict.fromkeys(PHASES, index)}))
        os.utime(file, (at, at))


def test_blocks_that_compile_do_not_count(tmp_path):
    saved(tmp_path, [0, 50, 90, 91, 100, 102, 105, 106])
    found = pace(tmp_path, 8)
    assert found.seconds == pytest.approx(2.0)
    assert found.phases == dict.fromkeys(PHASES, pytest.approx(5.5))
    assert COMPILING == 4


def test_a_stage_of_a_wavefront_is_compared_with_itself(tmp_path):
    saved(tmp_path, [0, 1, 2, 3, 100, 101, 110, 111, 120, 121])
    assert pace(tmp_path, 10, stages=2).seconds == pytest.approx(5.0)


@pytest.mark.slow
def test_the_speed_up_is_that_of_the_paces(capsys):
    main([*TINY, f"--config={ROOT / 'configs/precision/w4a4.yaml'}"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split(" a block")[0].strip() for row in rows] == ["one (GPU 0)", "one (GPU 1)", "data", "wavefront"]
    seconds = [float(re.search(r"every ([\d.]+) s", row)[1]) for row in rows]
    for row, several in zip(rows[2:], seconds[2:], strict=True):
        mean, least, most = map(float, re.search(r"([\d.]+) times .* \(([\d.]+) to ([\d.]+)\)", row).groups())
        ratios = [one / several for one in seconds[:2]]
        assert [mean, least, most] == pytest.approx([sum(ratios) / 2, min(ratios), max(ratios)], rel=0.1, abs=0.02)


def test_a_run_that_fails_is_shown():
    with pytest.raises(SystemExit, match=r"(?s)alone-\d ended early.*data\.batch_size"):
        main([*TINY, "--data.batch_size=0"])
