"""Names of a run directory's files: what is written is read again, and nothing else is."""

import pytest

from bisup_lightning.run_layout import (
    BLOCK,
    CONFIG,
    METRICS,
    RESULTS,
    THETA,
    TOKENS,
    RunFile,
    block_file,
    of_kind,
    parse,
    partial_file,
    partial_prefix,
    streams_file,
)

FILES = {
    CONFIG: RunFile("config"),
    TOKENS: RunFile("tokens"),
    block_file(7, BLOCK): RunFile("block", 7),
    block_file(7, METRICS): RunFile("metrics", 7),
    block_file(7, THETA): RunFile("theta", 7),
    streams_file(8): RunFile("streams", 8),
    partial_file(8, 1, 120): RunFile("partial", 8, attempt=1),
    "model/config.json": RunFile("model"),
    RESULTS: RunFile("results"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_name_says_what_the_file_is(name):
    assert parse(name) == FILES[name]
    assert of_kind(FILES[name].kind, FILES) == {name: FILES[name]}


@pytest.mark.parametrize(
    "name", ["", "manifest.json", "owner.json", "analysis.json", "logs/00000/metrics.csv", "blocks"]
)
def test_what_no_manifest_names(name):
    assert parse(name) is None


def test_the_names_of_old_runs_stay():
    assert block_file(7, BLOCK) == "blocks/00007/block.safetensors"
    assert streams_file(8) == "streams/00008.safetensors"
    assert partial_file(8, 1, 120) == "partial/00008-1-000120.ckpt"
    assert partial_file(8, 1, 120).startswith(partial_prefix(8))
