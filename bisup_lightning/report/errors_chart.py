"""Where the errors of several runs arise and how they spread, side by side (paper §5.4, Figure 3)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bisup_lightning.files import write_text
from bisup_lightning.report.charts import SERIES, STYLE, WIDE, as_svg, binned, plain_log
from bisup_lightning.report.compare import method, precision
from bisup_lightning.report.run import Run

ERRORS = "errors.svg"


def write_errors(folder: Path, runs: Sequence[Run]) -> Path | None:
    """Write `errors.svg` for the runs that were analyzed; its path, or None if no run was."""
    analyzed = [run for run in runs if run.analysis]
    if not analyzed:
        return None
    path = folder / ERRORS
    write_text(path, errors(analyzed))
    return path


def errors(runs: Sequence[Run]) -> str:
    """Relative error behind every block, a panel for each text, and behind the last block along a text that all share.

    Args:
        runs: Runs with the figures of `analyze`.
    """
    texts = list(dict.fromkeys(text for run in runs for text in run.analysis["sets"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 3 + 0.22 * len(runs) + 2.8), layout="constrained")
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False)
        panels = above.subplots(1, len(texts), squeeze=False, sharey=True)[0]
        for axes, text in zip(panels, texts, strict=True):
            _by_block(axes, runs, text)
        plain_log(panels[0])  # for all, now that the shared axis knows its ends
        panels[0].set_ylabel("relative mean square error\n(log scale)")
        shared = [text for text in texts if all(text in run.analysis["sets"] for run in runs)]
        _by_distance(below.subplots(), runs, (shared or texts)[-1])
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside upper left")
        return as_svg("errors", figure)


def _by_block(axes: Axes, runs: Sequence[Run], text: str) -> None:
    for place, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        values = run.analysis["sets"].get(text, {}).get("relative_mse", [])
        colour, marker = series(place)
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, label=label)
    axes.set(title="calibration text" if text == "calibration" else text, xlabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _by_distance(axes: Axes, runs: Sequence[Run], text: str) -> None:
    for place, run in enumerate(runs):
        colour, marker = series(place)
        for key, values in run.analysis["sets"].get(text, {}).get("by_position", {}).items():
            line = "--" if key == "prompt_quantized" else "-"
            axes.plot(*binned(values), line, color=colour, marker=marker, markevery=8)
    axes.plot([], [], "-", color="black", label="as run")
    axes.plot([], [], "--", color="black", label="prompt quantized like the rest")
    axes.set(
        title=f"along {text}, behind the last block",
        xlabel="distance from the first token of the text (tokens)",
        ylabel="relative mean square error\n(log scale)",
    )
    plain_log(axes)
    axes.legend(loc="best")


def series(place: int) -> tuple[str, str]:
    """Colour and marker of the n-th run; the pair is unique, also where the colours come again."""
    turn = place // len(SERIES)
    return SERIES[place % len(SERIES)][0], SERIES[(place + turn) % len(SERIES)][1]


def labels(runs: Sequence[Run]) -> list[str]:
    """Method and precision of each run, with the model and the folder only where they are needed to tell runs apart."""
    several = len({run.model_name for run in runs}) > 1
    names = [" ".join([*([run.model_name] if several else []), method(run), precision(run)]) for run in runs]
    return [f"{name} ({run.folder})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
