"""The grid of the paper's ablations: what is run, what is skipped, and how a trend is decided."""

import tarfile
from pathlib import Path

import pytest

from benchmarks.archive import unpack
from benchmarks.tables import Cell, Clock, cells_of, command_of, main, page_of, parse
from benchmarks.trends import trends_of
from bisup_lightning.parsers import build_parser
from tests.report.runs import results_of, write_run
from tests.report.test_compare import NO_PROMPT, RTN, run_of

GPTQ = {"solver.class_path": "x.GPTQ"} | NO_PROMPT


@pytest.fixture
def options(tmp_path):
    return parse([
        f"--checkpoint={write_model(tmp_path)}", f"--calibration={write_text(tmp_path)}", "--perplexity=wikitext2",
        f"--runs={tmp_path}", "--device=cpu", "--transforms=quarot", "--precisions=w4a4-g128", "--trainer.logger=false",
        f"--page={tmp_path / 'page.md'}",
    ])  # fmt: skip


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("words")
    return path


def write_model(folder):
    """As much of a checkpoint as is looked at before the first run."""
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    return model


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


@pytest.fixture
def fits(monkeypatch):
    """Stands in for `fit`: the names of the cells that were run; those of rank 16 fail."""
    names = []

    def fit(command, **settings):
        (folder,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--run_dir="))
        names.append(folder.name)
        settings["stderr"].write("working\nerror: no such key\n")
        if "-16-" not in folder.name:
            rank = int(folder.name.split("-")[-2])
            write_run(folder, results_of({"transform.class_path": "x.QuaRot", "solver.init_args.theta.rank": rank}))
        return type("Done", (), {"returncode": int("-16-" in folder.name)})

    monkeypatch.setattr("subprocess.run", fit)
    return names


def test_a_failed_run_is_named_and_the_rest_makes_the_page(options, fits, capsys):
    assert main([*options.given, "--tables=A13"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 runs, 0 of them finished before"
    assert [line.split()[0] for line in lines[1:4]] == ["[1/3]", "[2/3]", "[3/3]"]
    (failure,) = [line for line in lines if "FAILED" in line]
    assert "bisup-128-5-16-seed0: FAILED, saying: error: no such key; " in failure
    assert lines[-1].endswith("; 1 runs are left")
    page = options.page.read_text(encoding="utf-8")
    assert "2 runs on an abacus (torch 2.13.0, python 3.11.7)" in page
    assert f"python -m benchmarks.tables --checkpoint={options.checkpoint}" in page
    assert "python main.py fit --config=configs/base.yaml" in page
    assert "--run_dir=runs/w4a4-g128-quarot-bisup-128-5-32-seed0" in page


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--device=cuda", "--device: torch sees no CUDA device; give --device cpu"),
        ("--calibration=no/such.txt", "--calibration: there is no file no/such.txt"),
        ("--perplexity=wikitext2,no/such.txt", "--perplexity: there is no file no/such.txt"),
        ("--checkpoint=/no/such", "checkpoint: no folder /no/such"),
    ],
)
def test_what_would_fail_every_run_is_one_line_before_the_first(options, fits, monkeypatch, capsys, wrong, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*options.given, "--tables=A13", wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {words}")
    assert len(printed.err.splitlines()) == 1
    assert fits == []


def test_a_page_of_what_is_there_needs_neither_device_nor_texts(options, fits):
    write_run(options.runs / "w4a4-g128-quarot-bisup-128-5-32-seed0")
    assert main([*options.given, "--tables=A13", "--minutes=0", "--calibration=no/such.txt"]) == 0
    assert options.page.exists()


@pytest.mark.parametrize("tables", ["A13", "A13,A14"])
def test_when_the_first_run_fails_no_other_is_begun(options, fits, capsys, tables):
    """A grid whose runs all fail in the same way ends with the first of them."""
    assert main([*options.given, f"--tables={tables}", "--ranks=16", "--seeds=0,1,2"]) == 2
    assert len(fits) == 1
    assert "no other is begun" in capsys.readouterr().out


def test_a_failure_after_a_success_does_not_end_the_grid(options, fits):
    assert main([*options.given, "--tables=A13", "--ranks=16,32", "--seeds=0,1"]) == 1
    assert len(fits) == 4


def test_a_small_run_begins_first_and_then_the_longest(options, fits):
    assert main([*options.given, "--tables=A12", "--samples=128,64", "--iterations=5,10"]) == 0
    assert [name.split("bisup-")[1].split("-32-")[0] for name in fits] == ["64-5", "128-10", "128-5", "64-10"]


def test_what_fails_for_ever_is_an_error(options, fits, capsys):
    assert main([*options.given, "--tables=A13", "--ranks=16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no run is finished"
    assert not options.page.exists()


# --- from machine to machine ------------------------------------------------------------------------------------------


def test_an_archive_carries_figures_and_the_next_call_runs_the_rest(options, fits, tmp_path, capsys):
    """A second machine with nothing but the archive runs what is missing, and its page shows the figures of both."""
    archive = f"--archive={tmp_path / 'out' / 'tables.tar.gz'}"
    assert main([*options.given, "--tables=A13", "--ranks=32", archive]) == 0
    (first,) = fits
    (options.runs / first / "model.safetensors").write_bytes(bytes(1000))
    second = [*options.given, "--tables=A13", "--ranks=32,64", archive, f"--runs={tmp_path / 'elsewhere'}"]
    capsys.readouterr()
    assert main(second) == 0
    assert fits == [first, first.replace("-32-", "-64-")]
    assert "1 runs taken from it" in capsys.readouterr().out
    for path in ("results.json", "config.yaml", "logs/00000/metrics.csv"):
        assert (tmp_path / "elsewhere" / first / path).read_bytes() == (options.runs / first / path).read_bytes()
    assert not (tmp_path / "elsewhere" / first / "model.safetensors").exists()
    assert "Atom_BiSup" not in (page := options.page.read_text(encoding="utf-8"))
    assert "QuaRot_BiSup, R = 32" in page
    assert "QuaRot_BiSup, R = 64" in page
    both = tmp_path / "third"
    assert unpack(tmp_path / "out" / "tables.tar.gz", both) == sorted(fits)


def test_the_archive_is_there_as_soon_as_a_cell_is(options, fits, tmp_path, monkeypatch):
    """Whoever is killed before the end has what was finished."""
    archive, held = tmp_path / "tables.tar.gz", []

    class Watched(Clock):
        def tick(self, line):
            held.append(len(unpack(archive, tmp_path / str(len(held)))) if archive.exists() else 0)
            super().tick(line)

    monkeypatch.setattr("benchmarks.tables.Clock", Watched)
    main([*options.given, "--tables=A13", "--ranks=32,64,128", f"--archive={archive}"])
    assert held[0] == 0
    assert all(count >= done for done, count in enumerate(held))  # more where the next cell was quick
    assert len(held) == 3


def test_a_finished_run_is_not_overwritten_by_an_archive(options, fits, tmp_path):
    archive = tmp_path / "tables.tar.gz"
    main([*options.given, "--tables=A13", "--ranks=32", f"--archive={archive}"])
    (run,) = options.runs.glob("*seed0")
    (run / "results.json").write_text("newer")
    assert unpack(archive, options.runs) == []
    assert (run / "results.json").read_text() == "newer"


def test_no_run_is_begun_when_time_is_up(options, fits, tmp_path, capsys):
    write_run(options.runs / "w4a4-g128-quarot-bisup-128-5-32-seed0")
    assert main([*options.given, "--tables=A13", "--minutes=0"]) == 0
    assert fits == []
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {options.page}; 2 runs are left"
    assert "1 runs on an abacus" in options.page.read_text(encoding="utf-8")


def test_a_damaged_archive_is_one_line(options, fits, tmp_path, capsys):
    (tmp_path / "tables.tar.gz").write_bytes(b"no archive")
    assert main([*options.given, "--tables=A13", f"--archive={tmp_path / 'tables.tar.gz'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert fits == []


def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        tar.add(write_text(tmp_path), "../outside.txt")
    with pytest.raises(tarfile.TarError):
        unpack(tmp_path / "evil.tar.gz", tmp_path / "runs")
    assert not (tmp_path / "outside.txt").exists()


def test_runs_of_different_models_make_no_page(options, tmp_path, capsys):
    for rank, digest in ((32, "a"), (64, "b")):
        results = results_of({"checkpoint/model.safetensors": digest, "solver.init_args.theta.rank": rank})
        write_run(options.runs / f"w4a4-g128-quarot-bisup-128-5-{rank}-seed0", results)
    assert main([*options.given, "--tables=A13", "--minutes=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs of different models" in line
    assert not options.page.exists()


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
