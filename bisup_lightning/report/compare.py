"""Runs side by side in the layout of the paper's tables."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bisup_lightning.files import write_text
from bisup_lightning.report.alike import check_measured_alike, prompt, recipe, told_apart
from bisup_lightning.report.run import Run, precision_name

TRANSFORMS = {"NoTransform": "", "Atom": "Atom", "QuaRot": "QuaRot"}
TASK_HEADS = {
    "arc_challenge": "A-c", "arc_easy": "A-e", "boolq": "BQ", "hellaswag": "HS", "piqa": "PQ", "winogrande": "WG",
}  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """A table of text.

    Args:
        title: What it shows, with the paper's number.
        header: Names of the columns.
        rows: Cells, as many in each row as there are columns.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def latex(self) -> str:
        """As a tabular with the rules of booktabs."""
        columns = "l" * _label_columns(self) + "r" * (len(self.header) - _label_columns(self))
        lines = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in (self.header, *self.rows)]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        return f"% {self.title}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def _label_columns(table: PaperTable) -> int:
    return sum(head in ("precision", "method", "model", "S", "S – I – R", "figure") for head in table.header)


def _escaped(cell: str) -> str:
    for plain, latex in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("–", "--"), ("±", r"$\pm$")):  # fmt: skip  # noqa: E501
        cell = cell.replace(plain, latex)
    return cell


def write_tables(folder: Path, tables: Sequence[PaperTable]) -> None:
    """Write `compare.md`, `compare.csv` and `compare.tex`; the CSV begins each row with its table's title."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.md", "\n".join(table.markdown() for table in tables))
    write_text(folder / "compare.tex", "\n".join(table.latex() for table in tables))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        writer.writerows([table.title, *row] for row in (table.header, *table.rows))
    write_text(folder / "compare.csv", text.getvalue())


def precision(run: Run) -> str:
    """The paper's shorthand: W4A4-g128; the cache has the activations' bits unless its own are named."""
    name = precision_name(run.results["fingerprint"])
    bits = run.setting("precision.activations.bits", 16)
    return name.replace(f"KV{bits}", "") if f"A{bits}KV{bits}" in name else name


def has_prompt(run: Run) -> bool:
    """Whether a prompt stays at high precision."""
    return run.setting("prompt.kind") != "none"


def method(run: Run) -> str:
    """The paper's name: `Atom_BiSup`, `QuaRot (GPTQ)`, `Atom (RTN) + FWAC + SWAS`."""
    transform, solver = TRANSFORMS[run.class_name("transform")], run.class_name("solver")
    if solver != "BiSup":
        name = f"{transform} ({solver})" if transform else solver
        return name + (" + prompt" if has_prompt(run) else "")
    used = techniques(run)
    if used[1:] == ["SWAS", "SLREC"] and used[0] == "FWAC" and has_prompt(run):
        return f"{transform}_BiSup" if transform else "BiSup"
    return " + ".join([f"{transform} (RTN)" if transform else "RTN", *used, *(["prompt"] if has_prompt(run) else [])])


def techniques(run: Run) -> list[str]:
    """What a BiSup run learns, in the paper's letters."""
    clip = "WAC" if run.setting("precision.weights.granularity") == "tensor" else "FWAC"
    return [
        *([clip] if run.setting("solver.theta.clip") else []),
        *{"soft": ["SWAS"], "hard": ["WAS"]}.get(run.setting("solver.theta.smoothing"), []),
        *{"slrec": ["SLREC"], "lrec": ["LREC"]}.get(run.setting("solver.theta.low_rank"), []),
    ]


def budget(run: Run) -> tuple[int, int, int]:
    """Samples, iterations and rank; the latter two only where something is learned, else 0."""
    learned = run.class_name("solver") == "BiSup"
    iterations, rank = run.setting("solver.epochs", 0), run.setting("solver.theta.rank", 0)
    return run.setting("data.num_samples"), iterations if learned else 0, rank if learned else 0


def quantized_perplexity(name: str) -> Callable[[Run], float | None]:
    """A run's perplexity on a set, or None."""
    return lambda run: run.results["perplexity"].get(name, {}).get("quantized")


def tables_of(runs: Sequence[Run]) -> list[PaperTable]:
    """Every table of the paper that the runs have data for.

    Raises:
        UserError: If their figures do not compare.
    """
    check_measured_alike(runs)
    sets = list(dict.fromkeys(name for run in runs for name in run.results["perplexity"]))
    budgets = {budget(run) for run in runs if run.class_name("solver") == "BiSup"}
    tables = []
    for name in sets:
        tables += [_by_model(runs, name), _by_precision(runs, name)]
        bisup = [run for run in runs if method(run).endswith("BiSup")]
        if len({entry[:2] for entry in map(budget, bisup)}) > 1:
            tables.append(_samples_and_iterations(bisup, name))
        if len({budget(run)[2] for run in bisup}) > 1:
            tables.append(_ranks(bisup, name))
    if any(run.results["zero_shot"] for run in runs):
        tables.append(_zero_shot(runs))
    if budgets:
        tables.append(_cost([run for run in runs if run.class_name("solver") == "BiSup"]))
    return tables


def _grid(
    runs: Iterable[Run],
    row: Callable[[Run], tuple[str, ...]],
    column: Callable[[Run], str],
    value: Callable[[Run], float | None],
    form: str = ".2f",
) -> tuple[list[str], dict[tuple[str, ...], list[str]]]:
    """Columns, and cells by row. Runs that share a cell differ by their seed alone: their mean, ± half their range."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    columns: dict[str, None] = {}
    for run in runs:
        if (found := value(run)) is not None:
            columns[column(run)] = None
            cells.setdefault(row(run), {}).setdefault(column(run), []).append(found)

    def cell(values: list[float] | None) -> str:
        if not values:
            return "–"
        spread = (max(values) - min(values)) / 2
        return f"{mean(values):{form}}" + (f" ± {spread:{form}}" if len(values) > 1 else "")

    return list(columns), {key: [cell(line.get(name)) for name in columns] for key, line in cells.items()}


def _names(runs: Sequence[Run]) -> Callable[[Run], str]:
    """A run's method, with the settings other than the seed in which runs of one method, model and budget differ."""

    def place(run: Run) -> tuple[str, str, tuple[int, int, int]]:
        return run.model_name, precision(run), budget(run)

    apart = {
        name: told_apart([run for run in runs if method(run) == name], place, recipe) for name in map(method, runs)
    }
    return lambda run: method(run) + apart[method(run)](run)


def _names_and_models(runs: Sequence[Run]) -> Callable[[Run], str]:
    """The same with the model, where there are several."""
    name, several = _names(runs), len({run.model_name for run in runs}) > 1
    return lambda run: name(run) + (f", {run.model_name}" if several else "")


def _labels(runs: Sequence[Run]) -> Callable[[Run], str]:
    """A run's name, with its budget where runs of one method differ in it."""
    budgets: dict[tuple[str, str], set[tuple[int, int, int]]] = {}
    for run in runs:
        budgets.setdefault((precision(run), method(run)), set()).add(budget(run))
    varied = {name for (_, name), found in budgets.items() if len(found) > 1}
    name = _names(runs)
    return lambda run: name(run) + (f" {' – '.join(map(str, budget(run)))}" if method(run) in varied else "")


def _full_precision(runs: Sequence[Run]) -> Callable[[Run], dict[str, str]]:
    """Names of the full-precision rows that a run has figures for, by the figures' key; one row for each prompt."""
    apart = told_apart(filter(has_prompt, runs), lambda run: run.model_name, prompt)
    return lambda run: {"fp": "plain"} | ({"fp_prompt": f"behind the prompt{apart(run)}"} if has_prompt(run) else {})


def _by_model(runs: Sequence[Run], name: str) -> PaperTable:
    label = _labels(runs)
    columns, cells = _grid(
        runs, lambda run: (precision(run), label(run)), lambda run: run.model_name, quantized_perplexity(name)
    )
    names = _full_precision(runs)
    known: dict[str, dict[str, float]] = {}
    for run in runs:
        for key, row in names(run).items():
            if (figure := run.results["perplexity"].get(name, {}).get(key)) is not None:
                known.setdefault(row, {}).setdefault(run.model_name, figure)
    rows = [
        ("FP", row, *(f"{line[column]:.2f}" if column in line else "–" for column in columns))
        for row, line in known.items()
    ]
    rows += [(*key, *values) for key, values in cells.items()]
    return PaperTable(f"Tables 1, A1, A6, A7: perplexity on {name}", ("precision", "method", *columns), rows)


def _by_precision(runs: Sequence[Run], name: str) -> PaperTable:
    label = _labels(runs)
    several = len({run.model_name for run in runs}) > 1
    columns, cells = _grid(
        runs, lambda run: (*((run.model_name,) if several else ()), label(run)), precision, quantized_perplexity(name)
    )
    header = (*(("model",) if several else ()), "method", *columns)
    return PaperTable(
        f"Tables 3, A11: techniques, perplexity on {name}", header, [(*key, *line) for key, line in cells.items()]
    )


def _samples_and_iterations(runs: Sequence[Run], name: str) -> PaperTable:
    (rank,) = _most_common((budget(run)[2],) for run in runs if budget(run)[:2] != budget(runs[0])[:2])
    of_rank = [run for run in runs if budget(run)[2] == rank]
    label = _names_and_models(of_rank)
    columns, cells = _grid(
        sorted(of_rank, key=budget),
        lambda run: (precision(run), str(budget(run)[0])),
        lambda run: f"{label(run)}, I = {budget(run)[1]}",
        quantized_perplexity(name),
    )
    rows = [(*key, *line) for key, line in sorted(cells.items(), key=lambda item: (item[0][0], int(item[0][1])))]
    title = f"Table A12: samples S and iterations I at rank {rank}, perplexity on {name}"
    return PaperTable(title, ("precision", "S", *columns), rows)


def _ranks(runs: Sequence[Run], name: str) -> PaperTable:
    samples, iterations = _most_common(budget(run)[:2] for run in runs if budget(run)[2] != budget(runs[0])[2])
    of_budget = [run for run in runs if budget(run)[:2] == (samples, iterations)]
    label = _names_and_models(of_budget)
    columns, cells = _grid(
        sorted(of_budget, key=budget),
        lambda run: (precision(run),),
        lambda run: f"{label(run)}, R = {budget(run)[2]}",
        quantized_perplexity(name),
    )
    rows = [(*key, *line) for key, line in cells.items()]
    title = f"Table A13: rank R with {samples} samples and {iterations} iterations, perplexity on {name}"
    return PaperTable(title, ("precision", *columns), rows)


def _most_common(items: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    found = list(items)
    return max(found, key=found.count)


def _zero_shot(runs: Sequence[Run]) -> PaperTable:
    tasks = list(dict.fromkeys(task for run in runs for task in run.results["zero_shot"]))
    label = _labels(runs)

    def line(scores: Mapping[str, Mapping[str, Mapping[str, float]]], key: str) -> list[str]:
        values = [100 * scores[task][key]["value"] if task in scores else None for task in tasks]
        known = [value for value in values if value is not None]
        average = f"{mean(known):.2f}" if len(known) == len(tasks) else "–"
        return [*("–" if value is None else f"{value:.2f}" for value in values), average]

    measured = [run for run in runs if run.results["zero_shot"]]
    rows: dict[tuple[str, ...], None] = {}
    names = _full_precision(measured)
    for run in measured:
        for key, row in names(run).items():
            rows[(run.model_name, "FP", row, *line(run.results["zero_shot"], key))] = None
    for run in measured:
        rows[(run.model_name, precision(run), label(run), *line(run.results["zero_shot"], "quantized"))] = None
    heads = [next((head for known, head in TASK_HEADS.items() if task.startswith(known)), task) for task in tasks]
    header = ("model", "precision", "method", *heads, "Avg.")
    return PaperTable("Tables 2, A2–A5, A8–A10: zero-shot accuracy (%)", header, list(rows))


def _cost(runs: Sequence[Run]) -> PaperTable:
    name = _names(runs)

    def row(run: Run) -> tuple[str, ...]:
        return (precision(run), " – ".join(map(str, budget(run))))

    def column(run: Run) -> str:
        return f"{name(run)}, {run.model_name}"

    def memory(run: Run) -> float:
        return (run.results["peak_device_bytes"] or run.results["peak_host_bytes"]) / 2**20

    ordered = sorted(runs, key=budget)
    columns, minutes = _grid(ordered, row, column, lambda run: run.results["seconds"] / 60)
    _, mebibytes = _grid(ordered, row, column, memory, ".0f")
    on_device = all(run.results["peak_device_bytes"] for run in runs)
    what = "memory (MiB)" if on_device else "host memory (MiB)"
    rows = [
        (*key, figure, *cells[key]) for key in minutes for figure, cells in (("time (min)", minutes), (what, mebibytes))
    ]
    return PaperTable("Table A14: time and peak memory", ("precision", "S – I – R", "figure", *columns), rows)
