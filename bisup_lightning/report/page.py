"""One self-contained HTML page for a run: what was gained, at what price, and how it came about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bisup_lightning.files import write_text
from bisup_lightning.report import charts
from bisup_lightning.report.run import Run, precision_name

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write `report.html` into a finished run's folder.

    Raises:
        UserError: If the folder holds no finished run.
    """
    path = folder / REPORT
    write_text(path, render(Run.read(folder)))
    return path


def render(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("bisup_lightning.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "duration": duration}
    results = run.results
    return environment.get_template("page.html.jinja").render(
        run=run,
        results=results,
        precision=precision_name(results["fingerprint"]),
        method=method_name(run),
        perplexity=headline_perplexity(results["perplexity"]),
        kept=[block["index"] + 1 for block in results["blocks"] if block["kept_start"]],
        fingerprint=results["fingerprint"],
        charts={name: Markup(svg) for name, svg in charts.all_of(run).items()},
    )


def method_name(run: Run) -> str:
    """How the model was quantized, in words: `BiSup on Atom`, `RTN`."""
    transform = run.class_name("transform")
    return run.class_name("solver") + ("" if transform == "NoTransform" else f" on {transform}")


def headline_perplexity(sets: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """The first set's name and figures, with the relative rise over full precision behind the same prompt."""
    for name, figures in sets.items():
        return {"set": name, "rise": figures["quantized"] / figures["fp_prompt"] - 1, **figures}
    return None


def size(count: float) -> str:
    """Bytes for a person, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for a person: 12 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
