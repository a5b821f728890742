"""Results as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from bisup_lightning.report.run import precision_name


def perplexity_table(results: Mapping[str, Any]) -> Table:
    """Perplexity of one run's model by set, with its distance to the full-precision model."""
    table = Table(title="Perplexity", title_justify="left")
    columns = ("set", "FP", "FP behind the prompt", "quantized", "mean KL (nats)", "same top token")
    for column in columns:
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, figures in results["perplexity"].items():
        cells = [f"{figures[key]:.4f}" if key in figures else "–" for key in ("fp", "fp_prompt", "quantized", "kl")]
        table.add_row(name, *cells, f"{figures['top1']:.1%}" if "top1" in figures else "–")
    return table


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Any table of text."""
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def zero_shot_table(results: Mapping[str, Any]) -> Table:
    """Accuracy by task in percent, with one standard error."""
    table = Table(title="Zero-shot accuracy (%)", title_justify="left")
    for column in ("task", "metric", "FP", "FP behind the prompt", "quantized", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, row in results["zero_shot"].items():
        cells = [
            f"{100 * row[key]['value']:.2f} ± {100 * row[key]['stderr']:.2f}" if key in row else "–"
            for key in ("fp", "fp_prompt", "quantized")
        ]
        table.add_row(name, row["metric"], *cells, str(row["documents"]))
    return table


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Several runs of one model side by side; `excess` is the distance to FP behind the prompt, relative to the first.

    Runs stand below the full-precision figure that theirs is measured from: another prompt has another.

    Args:
        runs: Content of results.json by the run's name.
    """
    table = Table(title="Comparison", title_justify="left")
    for column in (
        "set",
        "run",
        "precision",
        "perplexity",
        "excess over FP",
        "of the first",
        "mean KL (nats)",
        "seconds",
    ):
        table.add_column(column, justify="left" if column in ("set", "run", "precision") else "right")
    names = {name: None for results in runs.values() for name in results["perplexity"]}
    for name in names:
        measured = {run: results for run, results in runs.items() if "quantized" in results["perplexity"].get(name, {})}
        first = None
        for reference in dict.fromkeys(_reference(results, name) for results in measured.values()):
            table.add_row(name, *reference, "0.0000", "", "0.0000", "")
            for run, results in measured.items():
                if _reference(results, name) != reference:
                    continue
                figures = results["perplexity"][name]
                excess = figures["quantized"] - figures["fp_prompt"]
                first = excess if first is None else first
                share = f"{excess / first:.2f}" if first > 0 else "–"
                cells = (f"{figures['quantized']:.4f}", f"{excess:.4f}", share, f"{figures['kl']:.4f}")
                table.add_row(name, run, precision_name(results["fingerprint"]), *cells, f"{results['seconds']:.0f}")
    return table


def _reference(results: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """First cells of the row that a run's excess is measured from."""
    plain = results["fingerprint"].get("prompt.kind") == "none"
    return "FP" if plain else "FP behind the prompt", "", f"{results['perplexity'][name]['fp_prompt']:.4f}"
