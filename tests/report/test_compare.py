"""The paper's tables from runs with known numbers: each figure in its row and column, in Markdown, CSV and LaTeX."""

import csv
from pathlib import Path

import pytest

from bisup_lightning.cli import main
from bisup_lightning.report.compare import method, precision, tables_of
from bisup_lightning.report.run import Run
from tests.report.runs import results_of, write_run

RTN = {"solver.class_path": "bisup_lightning.calibrate.solvers.RTN"}
QUAROT = {"transform.class_path": "bisup_lightning.transform.rotate.QuaRot"}
NO_PROMPT = {"prompt.kind": "none"}


def run_of(quantized=12.5, settings=None, **changes):
    figures = {"fp": 11.0, "fp_prompt": 10.0, "quantized": quantized, "kl": 0.1, "top1": 0.5}
    return Run(Path("run"), results_of(settings, perplexity={"wikitext2": figures}, **changes))


def table(runs, words):
    """The one table whose title has these words, as rows by heading."""
    (found,) = [table for table in tables_of(runs) if words in table.title]
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "Atom_BiSup"),
        (QUAROT, "QuaRot_BiSup"),
        ({"transform.class_path": "x.NoTransform"}, "BiSup"),
        (RTN | NO_PROMPT, "Atom (RTN)"),
        (RTN, "Atom (RTN) + prompt"),
        ({"solver.class_path": "x.GPTQ"} | NO_PROMPT | QUAROT, "QuaRot (GPTQ)"),
        (NO_PROMPT, "Atom (RTN) + FWAC + SWAS + SLREC"),
        (NO_PROMPT | {"solver.init_args.theta.low_rank": "none"}, "Atom (RTN) + FWAC + SWAS"),
        (
            NO_PROMPT
            | {"solver.init_args.theta.smoothing": "hard", "solver.init_args.theta.low_rank": "lrec"}
            | {"precision.weights.granularity": "tensor"},
            "Atom (RTN) + WAC + WAS + LREC",
        ),
    ],
)
def test_methods_have_the_papers_names(settings, name):
    assert method(run_of(settings=settings)) == name


def test_precisions_name_the_cache_only_if_it_is_its_own():
    assert precision(run_of(settings={"precision.weights.group_size": 128})) == "W4A4-g128"
    assert precision(run_of(settings={"precision.kv.bits": 8})) == "W4A4KV8"


def test_perplexity_by_model_has_full_precision_on_top():
    runs = [run_of(12.5), run_of(20.0, RTN | NO_PROMPT), run_of(9.5, checkpoint="org/other")]
    assert table(runs, "Tables 1") == [
        {"precision": "FP", "method": "plain", "<tiny>": "11.00", "other": "11.00"},
        {"precision": "FP", "method": "behind the prompt", "<tiny>": "10.00", "other": "10.00"},
        {"precision": "W4A4", "method": "Atom_BiSup", "<tiny>": "12.50", "other": "9.50"},
        {"precision": "W4A4", "method": "Atom (RTN)", "<tiny>": "20.00", "other": "–"},
    ]


def test_seeds_share_a_cell():
    runs = [run_of(12.0), run_of(13.0, {"seed": 1}), run_of(15.5, {"seed": 2})]
    assert table(runs, "Tables 3")[0]["W4A4"] == "13.50 ± 1.75"


def test_budgets_do_not_share_a_cell():
    runs = [run_of(12.0), run_of(11.5, {"data.num_samples": 256})]
    rows = table(runs, "Tables 3")
    assert [(row["method"], row["W4A4"]) for row in rows] == [
        ("Atom_BiSup 128 – 2 – 32", "12.00"), ("Atom_BiSup 256 – 2 – 32", "11.50"),
    ]  # fmt: skip


def test_samples_iterations_and_ranks_have_tables_of_their_own():
    runs = [
        run_of(12.0), run_of(11.5, {"data.num_samples": 64}), run_of(11.0, {"solver.init_args.epochs": 4}),
        run_of(10.5, {"solver.init_args.theta.rank": 64}),
    ]  # fmt: skip
    assert table(runs, "Table A12") == [
        {"precision": "W4A4", "S": "64", "Atom_BiSup, I = 2": "11.50", "Atom_BiSup, I = 4": "–"},
        {"precision": "W4A4", "S": "128", "Atom_BiSup, I = 2": "12.00", "Atom_BiSup, I = 4": "11.00"},
    ]
    assert table(runs, "Table A13") == [
        {"precision": "W4A4", "Atom_BiSup, R = 32": "12.00", "Atom_BiSup, R = 64": "10.50"}
    ]
    assert not [found for found in tables_of(runs[:1]) if "A12" in found.title or "A13" in found.title]


def test_time_in_minutes_and_memory_in_mebibytes():
    runs = [run_of(seconds=150.0, peak_device_bytes=3 * 2**30)]
    assert [list(row.values()) for row in table(runs, "Table A14")] == [
        ["W4A4", "128 – 2 – 32", "time (min)", "2.50"], ["W4A4", "128 – 2 – 32", "memory (MiB)", "3072"],
    ]  # fmt: skip


def test_zero_shot_has_the_papers_heads_and_an_average():
    def scores(fp, prompt, quantized):
        values = {"fp": fp, "fp_prompt": prompt, "quantized": quantized}
        return {"metric": "acc", "documents": 9} | {key: {"value": x, "stderr": 0.1} for key, x in values.items()}

    run = run_of(zero_shot={"piqa": scores(0.5, 0.6, 0.4), "hellaswag_val": scores(0.25, 0.35, 0.2)})
    rows = table([run], "zero-shot")
    assert [(row["precision"], row["PQ"], row["HS"], row["Avg."]) for row in rows] == [
        ("FP", "50.00", "25.00", "37.50"), ("FP", "60.00", "35.00", "47.50"), ("W4A4", "40.00", "20.00", "30.00"),
    ]  # fmt: skip


def test_the_command_prints_and_writes(tmp_path, capsys):
    runs = [write_run(tmp_path / name, results_of(settings)) for name, settings in (("a", {}), ("b", RTN | NO_PROMPT))]
    assert main(["compare", *map(str, runs), f"--output={tmp_path / 'tables'}"]) == 0
    assert "Atom_BiSup" in capsys.readouterr().out
    markdown = (tmp_path / "tables" / "compare.md").read_text(encoding="utf-8")
    assert "| W4A4 | Atom_BiSup | 12.50 |" in markdown
    with (tmp_path / "tables" / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert ["Tables 3, A11: techniques, perplexity on wikitext2", "Atom_BiSup", "12.50"] in rows
    latex = (tmp_path / "tables" / "compare.tex").read_text(encoding="utf-8")
    assert r"Atom\_BiSup & 12.50 \\" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == markdown.count("**") / 2
