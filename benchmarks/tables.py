"""The paper's ablations on one model: Tables 3, A11, A12, A13 and A14, and which of the paper's trends hold there.

    python benchmarks/tables.py --checkpoint REF --calibration wikipedia.txt --perplexity wiki.test.raw \
        --seq_len 1024 --max_chunks 64 --device cuda --jobs 4 --page docs/results.md

Every cell is one `python main.py fit`; cells that tables share are run once, and a finished one is not run again. The
cells of Table A14, where time is measured, run one at a time before the rest.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.trends import trends_of  # noqa: E402
from bisup_lightning.report.compare import tables_of  # noqa: E402
from bisup_lightning.report.run import RESULTS, Run  # noqa: E402

TABLES = ("3", "A11", "A12", "A13", "A14")
ABLATIONS = {"3": ("fwac", "fwac-swas", "fwac-swas-slrec"), "A11": ("wac", "fwac", "fwac-was", "fwac-swas")}
BASELINES = {"3": ("gptq", "rtn"), "A11": ("rtn",)}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        precision: Name of a file in configs/precision.
        transform: Name of a file in configs/transform.
        kind: `bisup`, a baseline (`rtn`, `gptq`: without the prompt) or the name of a file in configs/ablation.
        samples: Calibration sequences.
        iterations: Epochs.
        rank: Of the low-rank compensation.
        seed: Of all that is drawn.
    """

    precision: str
    transform: str
    kind: str
    samples: int
    iterations: int
    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder."""
        budget = f"{self.samples}-{self.iterations}-{self.rank}"
        return f"{self.precision}-{self.transform}-{self.kind}-{budget}-seed{self.seed}"

    def configs(self) -> list[str]:
        """The configurations that compose it, behind base."""
        solver = self.kind if self.kind in ("rtn", "gptq") else "bisup"
        files = [f"precision/{self.precision}", f"transform/{self.transform}", f"solver/{solver}"]
        if self.kind != "bisup":
            files.append("ablation/no-prompt" if solver == self.kind else f"ablation/{self.kind}")
        return files

    def options(self) -> list[str]:
        """The numbers."""
        learned = [f"--solver.epochs={self.iterations}", f"--solver.theta.rank={self.rank}"]
        baseline = self.kind in ("rtn", "gptq")
        return [f"--data.num_samples={self.samples}", f"--seed={self.seed}", *([] if baseline else learned)]


def cells_of(table: str, options: argparse.Namespace) -> list[Cell]:
    """The runs that a table shows."""
    samples, iterations, rank = options.samples[0], options.iterations[0], options.ranks[0]
    cells = []

    def add(kind: str, precision: str, transform: str, seed: int, *budget: int) -> None:
        cells.append(Cell(precision, transform, kind, *(budget or (samples, iterations, rank)), seed))

    for precision in options.precisions:
        for transform in options.transforms:
            for seed in options.seeds:
                place = (precision, transform, seed)
                if table in ABLATIONS:
                    for kind in (*BASELINES[table], *ABLATIONS[table], *(("bisup",) if table == "3" else ())):
                        add(kind, *place)
                elif table == "A12":
                    for count in options.samples:
                        for epochs in options.iterations:
                            add("bisup", *place, count, epochs, rank)
                elif table == "A13":
                    for size in options.ranks:
                        add("bisup", *place, samples, iterations, size)
                elif precision == options.timed_precision:
                    fewer, longer = min(options.samples), sorted(options.iterations)[:2][-1]
                    for budget in (
                        (fewer, iterations, rank),
                        (samples, iterations, rank),
                        (samples, longer, rank),
                        (samples, longer, max(options.ranks)),
                    ):
                        add("bisup", *place, *budget)
    return cells


def command_of(cell: Cell, options: argparse.Namespace) -> list[str]:
    """The `fit` of a cell."""
    configs = ["base", *(["paper/optimization"] if options.optimization == "paper" else []), *cell.configs()]
    return [
        sys.executable, "main.py", "fit", *(f"--config=configs/{name}.yaml" for name in configs),
        f"--checkpoint={options.checkpoint}", f"--run_dir={options.runs / cell.name}",
        f"--data.calibration={options.calibration}", f"--data.seq_len={options.seq_len}",
        f"--data.batch_size={options.batch_size}", f"--evaluation.seq_len={options.seq_len}",
        f"--evaluation.perplexity=[{','.join(options.perplexity)}]",
        *([f"--evaluation.max_chunks={options.max_chunks}"] if options.max_chunks else []),
        f"--trainer.accelerator={options.device}", *cell.options(), *options.more,
    ]  # fmt: skip


def run_all(cells: Sequence[Cell], options: argparse.Namespace, jobs: int) -> list[str]:
    """Run cells that are not finished, `jobs` at a time; names of those that failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def run(cell: Cell) -> str | None:
        if (options.runs / cell.name / RESULTS).is_file():
            return None
        with (options.runs / f"{cell.name}.log").open("w", encoding="utf-8") as log:
            command = command_of(cell, options)
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False)
        print(f"{cell.name}: {'finished' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)
        return cell.name if done.returncode else None

    with ThreadPoolExecutor(jobs) as pool:
        return [name for name in pool.map(run, cells) if name]


def page_of(cells_by_table: dict[str, list[Cell]], options: argparse.Namespace) -> str:
    """The Markdown page, from the runs that are finished."""
    runs = {
        cell: Run.read(options.runs / cell.name)
        for cells in cells_by_table.values()
        for cell in cells
        if (options.runs / cell.name / RESULTS).is_file()
    }
    versions = ", ".join(f"{name} {version}" for name, version in next(iter(runs.values())).results["versions"].items())
    device = next(iter(runs.values())).results["device"]
    parts = [
        f"# The paper's ablations on {Path(options.checkpoint).name}\n",
        f"{len(runs)} runs on {device} ({versions}), written by\n",
        f"```bash\n{shlex.join(['python', 'benchmarks/tables.py', *options.given])}\n```\n",
        "Perplexity of the quantized model; ± is half the range over seeds. A method without `prompt` or `BiSup` in "
        "its name quantizes the first token like any other, as the paper's baselines do.\n",
    ]
    for table, cells in cells_by_table.items():
        known = [runs[cell] for cell in dict.fromkeys(cells) if cell in runs]
        wanted = {"3": "Tables 3", "A11": "Tables 3"}.get(table, f"Table {table}")
        shown = [entry for entry in tables_of(known) if entry.title.startswith(wanted)] if known else []
        parts.append(f"## Table {table}\n")
        parts += [entry.markdown() for entry in shown] or ["No finished run.\n"]
        for trend in trends_of(table, known, Path(options.perplexity[0]).name):
            parts.append(trend.markdown())
    return "\n".join(parts)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `given` keeps them as they were typed, `more` what goes on to every `fit`."""

    def listed(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="Folder or hub id.")
    parser.add_argument("--calibration", default="wikitext2", help="Name of a set, or a local file.")
    parser.add_argument("--perplexity", type=listed, default=["wikitext2"], help="Sets or files; trends by the first.")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_chunks", type=int, help="Most chunks of each set.")
    parser.add_argument("--tables", type=listed, default=list(TABLES), help=",".join(TABLES))
    parser.add_argument("--precisions", type=listed, default=["w4a4", "w4a4-g128", "w3a3-g128"])
    parser.add_argument("--timed_precision", default="w4a4-g128", help="Of Table A14.")
    parser.add_argument("--transforms", type=listed, default=["atom", "quarot"])
    parser.add_argument("--samples", type=numbers, default=[128, 64, 256], help="The first is the standard.")
    parser.add_argument("--iterations", type=numbers, default=[5, 10, 20], help="The first is the standard.")
    parser.add_argument("--ranks", type=numbers, default=[32, 16, 64], help="The first is the standard.")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--optimization", choices=("default", "paper"), default="default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="Fits at a time.")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"), help="Where the runs go.")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="The page to write.")
    options, more = parser.parse_known_args(arguments)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"unknown tables {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    if foreign := [word for word in more if not word.startswith("--") or "=" not in word]:
        parser.error(f"{foreign[0]} is no option; what every fit shall be given is written --key=value")
    options.given, options.more, options.runs = list(arguments), more, options.runs.resolve()
    return options


def main(arguments: Sequence[str]) -> int:
    """Run what is missing and write the page."""
    options = parse(arguments)
    options.runs.mkdir(parents=True, exist_ok=True)
    cells_by_table = {table: cells_of(table, options) for table in TABLES if table in options.tables}
    timed = dict.fromkeys(cells_by_table.get("A14", []))
    rest = dict.fromkeys(cell for cells in cells_by_table.values() for cell in cells if cell not in timed)
    print(f"{len(timed) + len(rest)} runs", flush=True)
    failed = run_all(list(timed), options, jobs=1) + run_all(list(rest), options, options.jobs)
    if len(failed) == len(timed) + len(rest):
        print("no run finished", file=sys.stderr)
        return 1
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page_of(cells_by_table, options), encoding="utf-8")
    print(f"page: {options.page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
