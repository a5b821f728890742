"""The report's figures: functions from a run to SVG, in colours that colour-blind people can tell apart."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bisup_lightning.report.run import Run

BLACK, ORANGE, BLUE, GREEN, VERMILLION, PURPLE = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"
GREY = "#666666"
SERIES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (BLACK, "x"))  # Okabe and Ito
PHASES = (("#BDBDBD", ""), (ORANGE, "///"), (GREEN, ""), (BLUE, "\\\\\\"), (PURPLE, "..."), (BLACK, ""))  # of a block
SEQUENCE = colormaps["cividis"]  # for what has an order
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
}
WIDE, HALF = 8.8, 4.3  # inches


def as_svg(name: str, figure: Figure) -> str:
    """The figure as an SVG element whose ids are its own, so that several can stand on one page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)


def _axes(width: float, height: float, **labels: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)  # type: ignore[arg-type]  # the stub knows no keywords
    return figure, axes


def _blocks_on_x(axes: Axes, count: int) -> None:
    axes.set_xlabel("block")
    axes.set_xlim(0.5, count + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(visible=False, axis="x")


def _short(value: float, _: object = None) -> str:
    """A number as a person writes it: 0.05, 5, 1500, 2e-06."""
    return f"{value:.0f}" if 10 <= value < 1e5 else f"{value:.3g}"


def plain_log(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, even within one decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 1.5, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axes.yaxis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_ylim(low, high)


def perplexity(run: Run) -> str:
    """Perplexity on each set: full precision, behind the prompt, quantized."""
    sets = run.results["perplexity"]
    names = {"fp": "full precision", "fp_prompt": "full precision behind the prompt", "quantized": "quantized"}
    styles = {"fp": ("#BDBDBD", ""), "fp_prompt": (GREY, ""), "quantized": (BLUE, "///")}
    figure, axes = _axes(WIDE, 1 + 0.7 * len(sets), xlabel="perplexity (lower is better)")
    for place, (key, label) in enumerate(names.items()):
        colour, hatch = styles[key]
        values = [figures[key] for figures in sets.values()]
        rows = [index + (place - 1) * 0.27 for index in range(len(sets))]
        bars = axes.barh(rows, values, 0.25, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=4)
    axes.set_yticks(range(len(sets)), list(sets))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    figure.legend(loc="outside upper left", ncols=3)
    return as_svg("perplexity", figure)


def block_loss(run: Run) -> str:
    """Loss of every block before and after; blocks that kept their start are marked."""
    blocks = run.results["blocks"]
    x = [block["index"] + 1 for block in blocks]
    figure, axes = _axes(HALF, 3, ylabel="mean square error (log scale)")
    before, after = ([block[key] for block in blocks] for key in ("loss_initial", "loss_final"))
    kept = [block["kept_start"] for block in blocks]
    axes.vlines(x, after, before, color="#BDBDBD", linewidth=1.2)
    axes.plot(x, before, "o", color=ORANGE, label="start (rounding)", markerfacecolor="white", markeredgewidth=1.6)
    done = [(place, loss) for place, loss, same in zip(x, after, kept, strict=True) if not same]
    if done:
        axes.plot(*zip(*done, strict=True), "o", color=BLUE, label="after")
    if any(kept):
        same = [(place, loss) for place, loss, is_kept in zip(x, after, kept, strict=True) if is_kept]
        axes.plot(*zip(*same, strict=True), "X", color=VERMILLION, markersize=7, label="kept its start")
    plain_log(axes)
    _blocks_on_x(axes, len(blocks))
    axes.legend(loc="best")
    return as_svg("block-loss", figure)


def error_propagation(run: Run) -> str:
    """Relative error of the hidden state behind every block, on calibration text and, if analysed, on other text."""
    blocks = run.results["blocks"]
    curves = {name: figures["relative_mse"] for name, figures in run.analysis.get("sets", {}).items()}
    curves |= {"calibration": [block["relative_mse"] for block in blocks]}
    figure, axes = _axes(HALF, 3, ylabel="relative mean square error")
    for (name, values), (colour, marker) in zip(curves.items(), SERIES, strict=False):
        axes.plot(range(1, len(values) + 1), values, marker=marker, color=colour, label=name)
    _blocks_on_x(axes, len(blocks))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.legend(loc="best")
    return as_svg("error-propagation", figure)


def loss_curves(run: Run) -> str:
    """Training loss of every block over its epochs, relative to its start."""
    figure, axes = _axes(HALF, 3, xlabel="epoch", ylabel="training loss / loss of the start")
    blocks = {block["index"]: block for block in run.results["blocks"]}
    last = max(len(blocks) - 1, 1)
    for index, rows in run.epochs.items():
        losses = [row["loss"] / blocks[index]["loss_initial"] for row in rows if "loss" in row]
        label = f"block {index + 1}" if index in (min(run.epochs), max(run.epochs)) else None
        axes.plot(range(1, len(losses) + 1), losses, color=SEQUENCE(0.9 * index / last), marker=".", label=label)
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best", title="dark: early, light: late")
    return as_svg("loss-curves", figure)


def time_line(run: Run) -> str:
    """Seconds, minutes or hours of every block by part of the work, each with its share of the whole in the legend."""
    blocks = run.results["blocks"]
    total = sum(block["seconds"] for block in blocks)
    longest = max(block["seconds"] for block in blocks)
    unit, scale = ("s", 1) if longest < 300 else ("min", 60) if longest < 18_000 else ("h", 3600)
    figure, axes = _axes(HALF, 3, xlabel=f"time ({unit})", ylabel="block")
    rows = [block["index"] + 1 for block in blocks]
    left = [0.0] * len(blocks)
    phases: list[dict[str, float]] = [block.get("phases", {"in all": block["seconds"]}) for block in blocks]
    names: dict[str, float] = max(phases, key=len)  # not every block had to wait
    for place, phase in enumerate(names):
        values = [seconds.get(phase, 0.0) / scale for seconds in phases]
        colour, hatch = PHASES[place % len(PHASES)]
        label = f"{phase} {100 * scale * sum(values) / total:.0f} %"
        axes.barh(rows, values, 0.75, left, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_ylim(len(blocks) + 0.7, 0.3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8.5, columnspacing=1.2, handlelength=1.6)
    return as_svg("time-line", figure)


def by_position(name: str, figures: Mapping[str, Any]) -> str:
    """Relative error behind the last block by token position, with the prompt exact and quantized (paper §5.4)."""
    figure, axes = _axes(WIDE, 2.6, xlabel="position in the text (tokens)", ylabel="relative mean square error")
    styles = {
        "prompt_exact": ("prompt exact", BLUE, "-"),
        "prompt_quantized": ("prompt quantized like the rest", VERMILLION, "--"),
        "no_prompt": ("no prompt", BLUE, "-"),
    }
    for key, values in figures["by_position"].items():
        x, y = binned(values)
        label, colour, line = styles[key]
        axes.plot(x, y, line, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", title=name)
    return as_svg("by-position", figure)


def binned(values: Sequence[float], bins: int = 64) -> tuple[list[float], list[float]]:
    """Means over neighbouring positions, at most `bins`, with the middle of each."""
    width = -(-len(values) // bins)
    parts = [values[start : start + width] for start in range(0, len(values), width)]
    middles = [index * width + (len(part) - 1) / 2 for index, part in enumerate(parts)]
    return middles, [sum(part) / len(part) for part in parts]


def attention_maps(maps: Mapping[str, Any]) -> str:
    """Attention of full precision and quantized model side by side, mean over heads and texts (paper, Figure 2)."""
    shown, rows = maps["blocks"], ("fp", "quantized")
    figure = Figure(figsize=(WIDE, 5.4), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey=True)
    for line, key in zip(grid, rows, strict=True):
        for axes, index, map_TK in zip(line, shown, maps[key], strict=True):
            image = axes.imshow([[value**0.5 for value in row] for row in map_TK], cmap=SEQUENCE, vmin=0, vmax=1)
            axes.grid(visible=False)
            if key == "fp":
                axes.set_title(f"block {index + 1}", fontsize=10)
        line[0].set_ylabel(f"{'full precision' if key == 'fp' else key}\nquery (token)")
    for axes in grid[-1]:
        axes.set_xlabel("key (token, prompt first)")
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=grid, shrink=0.8, ticks=[tick**0.5 for tick in ticks])
    bar.ax.set_yticklabels([str(tick) for tick in ticks])
    bar.set_label("attention weight (root scale)")
    return as_svg("attention", figure)


def theta(run: Run) -> str:
    """What was learned in every block: range and mean of clip values, smoothing vectors and AB (§4.1–4.3)."""
    titles = {
        "weight_clip": "clip values of weights",
        "activation_clip": "clip values of activations",
        "s1": "smoothing s1 (norm)",
        "s2": "smoothing s2 (linears)",
        "low_rank": "low-rank product AB",
    }
    final = {index: rows[-1] for index, rows in run.epochs.items() if rows}
    shown = [key for key in titles if any(f"theta/{key}/mean" in row for row in final.values())]
    figure = Figure(figsize=(WIDE, 2.4 * -(-len(shown) // 3)), layout="constrained")
    for place, key in enumerate(shown, start=1):
        axes = figure.add_subplot(-(-len(shown) // 3), 3, place, title=titles[key])
        axes.title.set_fontsize(10)
        x = [index + 1 for index in final]
        low, mean, high = ([row[f"theta/{key}/{what}"] for row in final.values()] for what in ("min", "mean", "max"))
        axes.fill_between(x, low, high, color=BLUE, alpha=0.2, label="smallest to largest")
        axes.plot(x, mean, marker="o", color=BLUE, label="mean")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("block")
        if place == 1:
            axes.legend(loc="best", fontsize=8)
    return as_svg("theta", figure)


def all_of(run: Run) -> dict[str, str]:
    """Every figure that the run has data for, by name."""
    with rc_context(STYLE):
        figures = {"block_loss": block_loss(run), "error_propagation": error_propagation(run)}
        if run.results["perplexity"]:
            figures["perplexity"] = perplexity(run)
        if any("loss" in row for rows in run.epochs.values() for row in rows):
            figures["loss_curves"] = loss_curves(run)
        if any("theta/" in key for rows in run.epochs.values() for row in rows[-1:] for key in row):
            figures["theta"] = theta(run)
        figures["time_line"] = time_line(run)
        sets = run.analysis.get("sets", {})
        if sets:
            figures["by_position"] = by_position(*list(sets.items())[-1])
        if "attention" in run.analysis:
            figures["attention"] = attention_maps(run.analysis["attention"])
    return figures
