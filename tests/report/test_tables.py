"""Tables hold the numbers of results.json, each in its own column and row."""

import io

import pytest
from rich.console import Console

from bisup_lightning.report.run import precision_name
from bisup_lightning.report.tables import comparison_table, perplexity_table

W4 = {"precision.weights.bits": 4, "precision.activations.bits": 4, "precision.kv.bits": 4}


def cells(table):
    """Heading and rows as printed, by column."""
    text = io.StringIO()
    Console(file=text, width=300).print(table)
    lines = [line for line in text.getvalue().splitlines() if line[:1] in "┃│" and line[1:].strip()]
    heading, *rows = ([cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines)
    return heading, [dict(zip(heading, row, strict=True)) for row in rows]


def run_of(quantized, prompt=10.0, kl=0.5, seconds=61.4, settings=W4, name="wikitext2"):
    figures = {"fp": 11.0, "fp_prompt": prompt, "quantized": quantized, "kl": kl, "top1": 0.75}
    return {"perplexity": {name: figures}, "fingerprint": settings, "seconds": seconds}


def test_perplexity_by_set():
    results = {
        "perplexity": {
            "wikitext2": {"fp": 5.47211, "fp_prompt": 5.31, "quantized": 6.00009, "kl": 0.01234, "top1": 0.9316},
            "c4": {"fp": 7.25, "fp_prompt": 7.125, "quantized": 8.5, "kl": 0.1, "top1": 0.5},
        }
    }
    heading, rows = cells(perplexity_table(results))
    assert heading == ["set", "FP", "FP behind the prompt", "quantized", "mean KL (nats)", "same top token"]
    assert [list(row.values()) for row in rows] == [
        ["wikitext2", "5.4721", "5.3100", "6.0001", "0.0123", "93.2%"],
        ["c4", "7.2500", "7.1250", "8.5000", "0.1000", "50.0%"],
    ]


def test_a_checkpoint_alone_has_no_quantized_figures():
    _, (row,) = cells(perplexity_table({"perplexity": {"c4": {"fp": 7.25, "fp_prompt": 7.125}}}))
    assert list(row.values()) == ["c4", "7.2500", "7.1250", "–", "–", "–"]


def test_a_run_that_measured_nothing_has_an_empty_table():
    assert cells(perplexity_table({"perplexity": {}}))[1] == []


def test_a_figure_of_zero_is_a_figure():
    _, (row,) = cells(perplexity_table({"perplexity": {"c4": {"fp": 7.0, "fp_prompt": 7.0, "quantized": 7.0, "kl": 0.0, "top1": 0.0}}}))  # fmt: skip  # noqa: E501
    assert (row["mean KL (nats)"], row["same top token"]) == ("0.0000", "0.0%")


def test_comparison_measures_every_run_by_the_first():
    """Excess is the distance to FP behind the prompt; the first run's is one, half of it is one half."""
    runs = {"runs/rtn": run_of(14.0), "runs/bisup": run_of(12.0, kl=0.25, seconds=125.6), "runs/exact": run_of(10.0)}
    _, rows = cells(comparison_table(runs))
    assert [row["run"] for row in rows] == ["FP behind the prompt", *runs]
    assert {row["set"] for row in rows} == {"wikitext2"}
    assert [row["perplexity"] for row in rows] == ["10.0000", "14.0000", "12.0000", "10.0000"]
    assert [row["excess over FP"] for row in rows] == ["0.0000", "4.0000", "2.0000", "0.0000"]
    assert [row["of the first"] for row in rows] == ["", "1.00", "0.50", "0.00"]
    assert [row["mean KL (nats)"] for row in rows] == ["0.0000", "0.5000", "0.2500", "0.5000"]
    assert [row["seconds"] for row in rows] == ["", "61", "126", "61"]


def test_each_run_stands_below_its_own_reference():
    """Behind another prompt the FP model is another, and without one it is plain: each run's own distance counts."""
    runs = {
        "a": run_of(14.0, prompt=10.0),
        "b": run_of(14.0, prompt=12.0),
        "c": run_of(13.0, prompt=10.0),
        "d": run_of(16.0, prompt=11.0, settings=W4 | {"prompt.kind": "none"}),
    }
    _, rows = cells(comparison_table(runs))
    assert [(row["run"], row["perplexity"], row["excess over FP"], row["of the first"]) for row in rows] == [
        ("FP behind the prompt", "10.0000", "0.0000", ""), ("a", "14.0000", "4.0000", "1.00"),
        ("c", "13.0000", "3.0000", "0.75"),
        ("FP behind the prompt", "12.0000", "0.0000", ""), ("b", "14.0000", "2.0000", "0.50"),
        ("FP", "11.0000", "0.0000", ""), ("d", "16.0000", "5.0000", "1.25"),
    ]  # fmt: skip


def test_sets_that_only_some_runs_measured():
    both = run_of(14.0)
    both["perplexity"]["c4"] = run_of(20.0)["perplexity"]["wikitext2"]
    runs = {"a": run_of(12.0), "b": both, "c": run_of(30.0, name="c4")}
    _, rows = cells(comparison_table(runs))
    assert [(row["set"], row["run"]) for row in rows] == [
        ("wikitext2", "FP behind the prompt"), ("wikitext2", "a"), ("wikitext2", "b"),
        ("c4", "FP behind the prompt"), ("c4", "b"), ("c4", "c"),
    ]  # fmt: skip
    assert [row["of the first"] for row in rows] == ["", "1.00", "2.00", "", "1.00", "2.00"]


def test_a_first_run_without_excess_is_no_measure():
    """Nothing is divided by zero, or by a distance below it."""
    _, rows = cells(comparison_table({"a": run_of(10.0), "b": run_of(12.0)}))
    assert [row["of the first"] for row in rows[1:]] == ["–", "–"]
    _, rows = cells(comparison_table({"a": run_of(9.0), "b": run_of(12.0)}))
    assert [row["excess over FP"] for row in rows[1:]] == ["-1.0000", "2.0000"]
    assert [row["of the first"] for row in rows[1:]] == ["–", "–"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (W4, "W4A4KV4"),
        (W4 | {"precision.weights.bits": 3, "precision.weights.group_size": 128}, "W3A4KV4-g128"),
        (W4 | {"precision.activations.bits": 8, "precision.weights.group_size": None}, "W4A8KV4"),
        ({"precision.weights.bits": 3, "precision.activations": None, "precision.kv": None}, "W3A16KV16"),
    ],
)
def test_the_fields_shorthand(settings, name):
    assert precision_name(settings) == name
    assert cells(comparison_table({"a": run_of(12.0, settings=settings)}))[1][1]["precision"] == name
