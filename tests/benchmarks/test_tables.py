"""The grid of the paper's ablations: what is run, what is skipped, and how a trend is decided."""

import json

import pytest

from benchmarks.tables import Cell, cells_of, command_of, main, page_of, parse
from benchmarks.trends import trends_of
from bisup_lightning.cli import build_parser
from tests.report.runs import results_of, write_run
from tests.report.test_compare import NO_PROMPT, RTN, run_of

GPTQ = {"solver.class_path": "x.GPTQ"} | NO_PROMPT


@pytest.fixture
def options(tmp_path):
    return parse([
        "--checkpoint=model", f"--calibration={write_text(tmp_path)}", "--perplexity=wikitext2", f"--runs={tmp_path}",
        "--transforms=quarot", "--precisions=w4a4-g128", "--trainer.logger=false", f"--page={tmp_path / 'page.md'}",
    ])  # fmt: skip


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("words")
    return path


def kinds(table, options):
    return [(cell.kind, cell.samples, cell.iterations, cell.rank) for cell in cells_of(table, options)]


def test_the_grid_is_that_of_the_paper(options):
    standard = (128, 5, 32)
    assert kinds("3", options) == [
        (kind, *standard) for kind in ("gptq", "rtn", "fwac", "fwac-swas", "fwac-swas-slrec", "bisup")
    ]
    assert kinds("A11", options) == [(kind, *standard) for kind in ("rtn", "wac", "fwac", "fwac-was", "fwac-swas")]
    assert {entry[1:3] for entry in kinds("A12", options)} == {(s, i) for s in (64, 128, 256) for i in (5, 10, 20)}
    assert {entry[1:] for entry in kinds("A13", options)} == {(128, 5, rank) for rank in (16, 32, 64)}
    assert [entry[1:] for entry in kinds("A14", options)] == [(64, 5, 32), standard, (128, 10, 32), (128, 10, 64)]


@pytest.mark.parametrize("kind", ["gptq", "rtn", "bisup", "wac", "fwac-was"])
def test_every_command_is_understood(options, kind):
    cell = Cell("w4a4-g128", "quarot", kind, 64, 10, 16, 3)
    config = build_parser().parse_args(command_of(cell, options)[2:]).fit
    assert (config.data.num_samples, config.seed, config.run_dir.name) == (64, 3, cell.name)
    assert (config.prompt.kind == "none") == (kind != "bisup")
    assert config.trainer.logger is False
    if kind not in ("gptq", "rtn"):
        assert (config.solver.init_args.epochs, config.solver.init_args.theta.rank) == (10, 16)


def test_finished_runs_are_not_run_again_and_make_the_page(options, monkeypatch, capsys):
    table = ["--tables=A13"]
    for cell, quantized in zip(cells_of("A13", options), (12.0, 13.0, 11.0), strict=True):
        results = results_of({"transform.class_path": "x.QuaRot", "solver.init_args.theta.rank": cell.rank})
        results["perplexity"]["wikitext2"]["quantized"] = quantized
        write_run(options.runs / cell.name, results)
    monkeypatch.setattr("subprocess.run", None)
    assert main([*options.given, *table]) == 0
    page = options.page.read_text(encoding="utf-8")
    assert "| W4A4 | 13.00 | 12.00 | 11.00 |" in page
    assert "**A higher rank is better: holds.**" in page
    assert page == page_of({"A13": cells_of("A13", options)}, parse([*options.given, *table]))


def test_a_failed_run_is_named_and_the_rest_makes_the_page(options, monkeypatch, capsys):
    def fit(command, **settings):
        (folder,) = [word.partition("=")[2] for word in command if word.startswith("--run_dir=")]
        if "-16-" not in folder:
            write_run(type(options.runs)(folder), json.loads(json.dumps(results_of())))
        return type("Done", (), {"returncode": int("-16-" in folder)})

    monkeypatch.setattr("subprocess.run", fit)
    assert main([*options.given, "--tables=A13"]) == 1
    assert "bisup-128-5-16-seed0: FAILED" in capsys.readouterr().out
    assert options.page.is_file()


@pytest.mark.parametrize("words", [["--tables=B7"], ["--no_such", "key"]])
def test_unknown_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--checkpoint=model", *words])
    assert caught.value.code == 2


def verdicts(table, runs):
    return {trend.claim: trend.verdict() for trend in trends_of(table, runs, "wikitext2")}


def test_trends_are_decided_by_the_numbers():
    def rank(size, quantized):
        return run_of(quantized, {"solver.init_args.theta.rank": size})

    assert verdicts("A13", [rank(64, 11.0), rank(16, 13.0), rank(32, 12.0)]) == {"A higher rank is better": "holds"}
    mixed = verdicts("A13", [rank(16, 13.0), rank(32, 12.0), rank(64, 12.5)])
    assert mixed == {"A higher rank is better": "holds in 1 of 2 cases"}
    assert verdicts("A13", [rank(16, 12.0), rank(32, 12.0)]) == {"A higher rank is better": "does not hold"}
    assert verdicts("A13", [rank(16, 12.0)]) == {}


def test_methods_are_compared_in_their_own_place():
    easy = {"precision.weights.group_size": 128}
    runs = [run_of(10.9), run_of(20.0, GPTQ), run_of(10.9, easy), run_of(11.0, GPTQ | easy), run_of(30.0, RTN | NO_PROMPT)]  # fmt: skip  # noqa: E501
    found = verdicts("3", runs)
    assert found["BiSup is better than GPTQ"] == "holds"
    assert found["BiSup gains less over GPTQ at W4A4-g128 than elsewhere (%)"] == "holds"
    assert "FWAC is better than RTN" not in found


def test_a_difference_within_the_seeds_says_so():
    bisup = [run_of(12.0), run_of(12.6, {"seed": 1})]
    (trend, *_) = [t for t in trends_of("3", [*bisup, run_of(12.5, GPTQ)], "wikitext2") if "GPTQ" in t.claim]
    assert trend.verdict() == "holds"
    assert "12.30 < 12.50 (within the spread of the seeds)" in trend.markdown()
