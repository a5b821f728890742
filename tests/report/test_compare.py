"""The paper's tables from runs with known numbers: each figure in its row and column, in Markdown, CSV and LaTeX."""

import csv
import re
from pathlib import Path

import pytest

from bisup_lightning.cli import main
from bisup_lightning.errors import UserError
from bisup_lightning.report.compare import method, precision, tables_of
from bisup_lightning.report.run import Run
from tests.report.runs import results_of, write_run

RTN = {"solver.class_path": "bisup_lightning.calibrate.solvers.RTN"}
QUAROT = {"transform.class_path": "bisup_lightning.transform.rotate.QuaRot"}
NO_PROMPT = {"prompt.kind": "none"}
SLOW, FAST = ({"solver.init_args.optimization.clip_lr": rate} for rate in (0.05, 0.5))


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


def test_runs_that_differ_in_more_than_their_seed_have_rows_of_their_own():
    """Those of one learning rate are averaged over their seeds, and nothing is said of settings that all share."""
    runs = [
        run_of(12.0, SLOW), run_of(13.0, SLOW | {"seed": 1}), run_of(30.0, FAST), run_of(20.0, RTN | NO_PROMPT),
    ]  # fmt: skip
    rows = [
        ("Atom_BiSup (clip_lr 0.05)", "12.50 ± 0.50"), ("Atom_BiSup (clip_lr 0.5)", "30.00"), ("Atom (RTN)", "20.00"),
    ]  # fmt: skip
    assert [(row["method"], row["W4A4"]) for row in table(runs, "Tables 3")] == rows
    assert [(row["method"], row["<tiny>"]) for row in table(runs, "Tables 1")[2:]] == rows


def test_settings_tell_columns_apart():
    budgets = [{"solver.init_args.epochs": 2}, {"solver.init_args.theta.rank": 64}, {"data.num_samples": 64}]
    runs = [run_of(10.0 + place, lr | budget) for place, lr in enumerate((SLOW, FAST)) for budget in budgets]
    (a12, *_), (a13,), (a14, *_) = (table(runs, f"Table {name}") for name in ("A12", "A13", "A14"))
    assert (a12["Atom_BiSup (clip_lr 0.05), I = 2"], a12["Atom_BiSup (clip_lr 0.5), I = 2"]) == ("10.00", "11.00")
    assert (a13["Atom_BiSup (clip_lr 0.05), R = 64"], a13["Atom_BiSup (clip_lr 0.5), R = 64"]) == ("10.00", "11.00")
    assert {"Atom_BiSup (clip_lr 0.05), <tiny>", "Atom_BiSup (clip_lr 0.5), <tiny>"} <= a14.keys()


def test_models_are_not_averaged():
    runs = [
        run_of(quantized, {"solver.init_args.theta.rank": rank, "solver.init_args.epochs": epochs}, checkpoint=name)
        for quantized, name in ((10.0, "org/one"), (20.0, "org/two"))
        for rank, epochs in ((32, 2), (32, 4), (64, 2))
    ]
    (a12,), (a13,) = table(runs, "Table A12"), table(runs, "Table A13")
    assert [a12[f"Atom_BiSup, {name}, I = 4"] for name in ("one", "two")] == ["10.00", "20.00"]
    assert [a13[f"Atom_BiSup, {name}, R = 64"] for name in ("one", "two")] == ["10.00", "20.00"]


@pytest.mark.parametrize(
    ("key", "values", "labels"),
    [
        ("solver.init_args.fp_epochs", (0, 3), ("fp_epochs 0", "fp_epochs 3")),
        ("precision.activations.group_size", (None, 64), ("", "activations.group_size 64")),
        ("precision.weights.symmetric", (True, False), ("weights.symmetric true", "weights.symmetric false")),
        ("transform.init_args.outlier_bits", (8, None), ("transform.outlier_bits 8", "")),
        ("data.calibration", ("a/one.txt", "b/two.txt"), ("data.calibration one.txt", "data.calibration two.txt")),
        ("device", ("cpu", "cuda"), ("device cpu", "device cuda")),
    ],
)
def test_every_setting_but_the_seed_tells_runs_apart(key, values, labels):
    runs = [run_of(12.0 + place, {key: value}) for place, value in enumerate(values)]
    assert [(row["method"], row["W4A4"]) for row in table(runs, "Tables 3")] == [
        (f"Atom_BiSup ({label})" if label else "Atom_BiSup", f"{12 + place}.00") for place, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("prompt.text", ("<|a|>\n", "<|b|>\n"), "prompt.text"),
        ("theta_from/blocks/00000/theta.safetensors", ("1", "2"), "theta_from"),
        ("checkpoint/model-00002.safetensors", ("1", "2"), "checkpoint"),
    ],
)
def test_files_and_long_texts_are_shown_by_a_digest(key, values, shown):
    rows = table([run_of(12.0 + place, {key: value}) for place, value in enumerate(values)], "Tables 3")
    assert [row["W4A4"] for row in rows] == ["12.00", "13.00"]
    assert all(re.fullmatch(rf"Atom_BiSup \({shown} [0-9a-f]{{8}}\)", row["method"]) for row in rows)


def test_a_text_is_known_by_its_content():
    """The same file elsewhere is the same; another one of its name is not."""
    same, moved, other = ({"data.calibration": f"{place}/t.txt", f"text/{place}/t.txt": digest} for place, digest in (("a", "11"), ("b", "11"), ("c", "22")))  # fmt: skip  # noqa: E501
    assert table([run_of(12.0, same), run_of(13.0, moved | {"seed": 1})], "Tables 3")[0]["W4A4"] == "12.50 ± 0.50"
    rows = table([run_of(12.0, same), run_of(13.0, other)], "Tables 3")
    assert [row["method"] for row in rows] == [
        "Atom_BiSup (data.calibration t.txt 11)", "Atom_BiSup (data.calibration t.txt 22)",
    ]  # fmt: skip


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


# --- what is measured alike -------------------------------------------------------------------------------------------


def measured(fp, settings=None, name="wikitext2", **changes):
    figures = {"fp": fp, "fp_prompt": fp - 1, "quantized": fp + 2, "kl": 0.1, "top1": 0.5}
    return Run(Path(f"run-{fp}"), results_of(settings, perplexity={name: figures}, **changes))


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "words"),
    [
        ("wikitext2", {"evaluation.seq_len": 1024}, {}, "evaluation.seq_len: 1024 → 2048"),  # the calibration's
        ("wikitext2", {"evaluation.max_chunks": 9}, {"evaluation.max_chunks": None}, "evaluation.max_chunks: 9 → None"),
        (
            "t.txt",
            {"evaluation.perplexity": ["a/t.txt"], "text/a/t.txt": "1111111111"},
            {"evaluation.perplexity": ["b/t.txt"], "text/b/t.txt": "2222222222"},
            "text t.txt: 11111111 → 22222222",
        ),
        ("wikitext2", {"checkpoint/a": "1"}, {"checkpoint/a": "2"}, "checkpoint <tiny>: "),
        ("self", {"seed": 0}, {"seed": 1}, "seed: 0 → 1"),
    ],
)  # fmt: skip
def test_figures_that_do_not_compare_are_refused(name, ours, theirs, words):
    with pytest.raises(UserError) as caught:
        tables_of([measured(11.0, ours, name), measured(12.0, theirs, name)])
    assert f"run-11.0 and run-12.0 measured {name} differently ({words}" in str(caught.value)
    assert ";" not in str(caught.value).split("(")[1].split(")")[0]  # nothing but that key
    assert tables_of([measured(11.0, ours, name), measured(11.0, theirs, name)])  # the same figure, so it compares


def test_what_does_not_touch_full_precision_is_compared():
    """Other models have other figures, the seed is no part of a named set, and a device changes last digits."""
    runs = [
        measured(11.0, {"checkpoint/a": "1"}), measured(11.00001, {"checkpoint/a": "1", "seed": 1, "device": "cuda"}),
        measured(30.0, {"checkpoint/a": "2"}, checkpoint="org/other"), measured(12.0, {"evaluation.seq_len": 9}, "c4"),
    ]  # fmt: skip
    assert table(runs[:3], "Tables 1")[0] == {"precision": "FP", "method": "plain", "<tiny>": "11.00", "other": "30.00"}
    assert table(runs, "A7: perplexity on c4")


def test_the_same_model_and_tasks_are_seen_to_for_zero_shot_scores():
    def scored(fp, limit):
        scores = {key: {"value": fp, "stderr": 0.1} for key in ("fp", "fp_prompt", "quantized")}
        return run_of(settings={"evaluation.zero_shot_limit": limit}, zero_shot={"piqa": {"metric": "acc", **scores}})

    with pytest.raises(UserError, match=r"measured piqa differently \(evaluation.zero_shot_limit: 10 → 20\)"):
        tables_of([scored(0.5, 10), scored(0.6, 20)])


def test_every_prompt_has_its_row_of_full_precision():
    runs = [run_of(12.5), run_of(12.0, {"prompt.kind": "system"}), run_of(20.0, RTN | NO_PROMPT)]
    runs[1].results["perplexity"]["wikitext2"]["fp_prompt"] = 9.0
    assert [(row["method"], row["<tiny>"]) for row in table(runs, "Tables 1")] == [
        ("plain", "11.00"), ("behind the prompt (prompt.kind bos)", "10.00"),
        ("behind the prompt (prompt.kind system)", "9.00"),
        ("Atom_BiSup (prompt.kind bos)", "12.50"), ("Atom_BiSup (prompt.kind system)", "12.00"),
        ("Atom (RTN)", "20.00"),
    ]  # fmt: skip


def test_the_command_refuses_before_it_prints(tmp_path, capsys):
    runs = [write_run(tmp_path / name, measured(fp, {"evaluation.seq_len": length}).results) for name, fp, length in (("a", 11.0, 64), ("b", 12.0, 128))]  # fmt: skip  # noqa: E501
    assert main(["compare", *map(str, runs), f"--output={tmp_path / 'tables'}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line == (
        f"error: {runs[0]} and {runs[1]} measured wikitext2 differently (evaluation.seq_len: 64 → 128); "
        "compare them apart, or measure both alike"
    )
    assert not (tmp_path / "tables").exists()


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
