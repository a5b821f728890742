"""The paper's ablations on one model: Tables 3, A11, A12, A13 and A14, and which of the paper's trends hold there.

    python -m benchmarks.tables --checkpoint REF --calibration wikipedia.txt --perplexity wiki.test.raw \
        --seq_len 1024 --max_chunks 64 --device cuda --jobs 4 --page docs/results.md --archive tables.tar.gz --minutes 9

Every cell is one `python main.py fit`; cells that tables share are run once, and a finished one is not run again. Table
A12, the longest, and A14 take the first seed alone. The cells of Table A14, where time is measured, run one at a time
before the rest. What would fail every run is refused before the first; a small run begins first, and if that fails, no
other is begun. The archive gets the figures of each cell when it is finished, and gives them back to the next call, on
whatever machine; `--minutes 0` runs nothing and writes the page from what is there.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.archive import pack, unpack
from benchmarks.trends import trends_of
from bisup_lightning.data.corpus import check_source
from bisup_lightning.errors import UserError
from bisup_lightning.model.checkpoint import resolve
from bisup_lightning.report.compare import tables_of
from bisup_lightning.report.run import Run
from bisup_lightning.run_layout import RESULTS

ROOT = Path(__file__).parent.parent
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
                    if seed != options.seeds[0]:
                        continue
                    for count in options.samples:
                        for epochs in options.iterations:
                            add("bisup", *place, count, epochs, rank)
                elif table == "A13":
                    for size in options.ranks:
                        add("bisup", *place, samples, iterations, size)
                elif place == (options.timed_precision, options.transforms[0], options.seeds[0]):
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


def check_inputs(options: argparse.Namespace) -> None:
    """Refuse what would fail every run, before the first.

    Raises:
        UserError: Naming the option.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no CUDA device; give --device cpu")
    with chdir(ROOT):  # where every fit runs
        check_source("--calibration", options.calibration)
        for source in options.perplexity:
            check_source("--perplexity", source)
        resolve(options.checkpoint)


class Clock:
    """Tells how far the grid is, and when to begin no more.

    Args:
        count: Cells that are to be run.
        minutes: After which none is begun; None for no end.
    """

    def __init__(self, count: int, minutes: float | None) -> None:
        self.count, self.done, self.began = count, 0, time.monotonic()
        self.end = self.began + 60 * minutes if minutes is not None else float("inf")

    def over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self.end

    def stop(self) -> None:
        """Let time be up."""
        self.end = self.began

    def tick(self, line: str) -> None:
        """Print that one more cell is done."""
        self.done += 1
        passed = time.monotonic() - self.began
        left = passed / self.done * (self.count - self.done)
        print(f"[{self.done}/{self.count}] {line}; {passed:.0f} s so far, about {left:.0f} s to go", flush=True)


def run_all(
    cells: Sequence[Cell], options: argparse.Namespace, jobs: int, clock: Clock, probe: Cell | None
) -> list[str]:
    """Run cells, `jobs` at a time, and put the figures of each into the archive; names of those that failed.

    Args:
        cells: What to run.
        options: The command line's.
        jobs: Cells at a time.
        clock: When to begin no more.
        probe: The cell whose failure is taken for that of all: none is begun after it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def run(cell: Cell) -> tuple[str, int, float] | None:
        if clock.over():
            return None
        began = time.monotonic()
        with (options.runs / f"{cell.name}.log").open("w", encoding="utf-8") as log:
            command = command_of(cell, options)
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode and cell == probe:
            clock.stop()
        return cell.name, done.returncode, time.monotonic() - began

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, cell) for cell in cells]):
            if (ended := future.result()) is None:
                continue
            name, code, seconds = ended
            words = (options.runs / f"{name}.log").read_text(encoding="utf-8").splitlines() or ["nothing"]
            clock.tick(f"{name}: finished in {seconds:.0f} s" if code == 0 else f"{name}: FAILED, saying: {words[-1]}")
            if code and probe and name == probe.name:
                print("no other is begun, as it would likely fail, too", flush=True)
            if code:
                failed.append(name)
            elif options.archive:
                pack(options.runs, options.archive)
    return failed


def check_same_model(runs: Iterable[Run]) -> None:
    """Refuse runs of different checkpoints, which an archive may bring together.

    Raises:
        UserError: Naming two of them.
    """
    known: dict[tuple[tuple[str, str], ...], Run] = {}
    for run in runs:
        files = {key: value for key, value in run.results["fingerprint"].items() if key.startswith("checkpoint/")}
        known[tuple(sorted(files.items()))] = run
    if len(known) > 1:
        first, second, *_ = (run.folder.name for run in known.values())
        raise UserError(
            f"{first} and {second} are runs of different models; give each model its own --runs and --archive"
        )


def finished(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether a cell has its figures."""
    return (options.runs / cell.name / RESULTS).is_file()


def page_of(cells_by_table: dict[str, list[Cell]], options: argparse.Namespace) -> str:
    """The Markdown page, from the runs that are finished."""
    runs = {
        cell: Run.read(options.runs / cell.name)
        for cells in cells_by_table.values()
        for cell in cells
        if finished(cell, options)
    }
    check_same_model(runs.values())
    machines = dict.fromkeys(
        f"{run.results['device']} ({', '.join(' '.join(pair) for pair in run.results['versions'].items())})"
        for run in runs.values()
    )
    example = [
        "python",
        *command_of(next(iter(runs)), argparse.Namespace(**vars(options) | {"runs": Path("runs")}))[1:],
    ]
    missing = len(set().union(*cells_by_table.values())) - len(runs)
    parts = [
        f"# The paper's ablations on {Path(options.checkpoint).name}\n",
        f"{len(runs)} runs on {'; '.join(machines)}, written by\n",
        f"```bash\n{shlex.join(['python', '-m', 'benchmarks.tables', *options.given])}\n```\n",
        f"Each is one `fit`, the first of them\n\n```bash\n{shlex.join(example)}\n```\n",
        "Perplexity of the quantized model; ± is half the range over seeds. A method without `prompt` or `BiSup` in "
        "its name quantizes the first token like any other, as the paper's baselines do.\n",
        *([f"{missing} runs of the grid are still to be made; a dash stands for them.\n"] if missing else []),
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
    parser.add_argument(
        "--timed_precision", default="w4a4-g128", help="Of Table A14, with the first transform and seed."
    )
    parser.add_argument("--transforms", type=listed, default=["atom", "quarot"])
    parser.add_argument("--samples", type=numbers, default=[128, 64, 256], help="The first is the standard.")
    parser.add_argument("--iterations", type=numbers, default=[5, 10, 20], help="The first is the standard.")
    parser.add_argument("--ranks", type=numbers, default=[32, 16, 64], help="The first is the standard.")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--optimization", choices=("default", "paper"), default="default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="Fits at a time.")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"), help="Where the runs go.")
    parser.add_argument("--archive", type=Path, help="File (.tar.gz) with the runs' figures, read first and written.")
    parser.add_argument("--minutes", type=float, help="Begin no run after these.")
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
    for folder in (options.runs, options.page.parent, *([options.archive.parent] if options.archive else [])):
        folder.mkdir(parents=True, exist_ok=True)
    cells_by_table = {table: cells_of(table, options) for table in TABLES if table in options.tables}
    try:
        if options.archive and options.archive.is_file():
            print(f"{options.archive}: {len(unpack(options.archive, options.runs))} runs taken from it", flush=True)
        cells = dict.fromkeys(cell for table in cells_by_table.values() for cell in table)
        missing = [cell for cell in cells if not finished(cell, options)]
        timed = [cell for cell in missing if cell in cells_by_table.get("A14", [])]
        rest = [cell for cell in missing if cell not in timed]
        rest.sort(key=lambda cell: -cell.samples * cell.iterations)  # the longest first, lest others wait for them
        rest = rest[-1:] + rest[:-1]  # but for one of the shortest, which soon tells what would fail them all
        clock, probe = Clock(len(missing), options.minutes), next(iter([*timed, *rest]), None)
        if missing and not clock.over():
            check_inputs(options)
        print(f"{len(cells)} runs, {len(cells) - len(missing)} of them finished before", flush=True)
        failed = run_all(timed, options, 1, clock, probe) + run_all(rest, options, options.jobs, clock, probe)
        if not any(finished(cell, options) for cell in cells):
            raise UserError("no run is finished")
        if options.archive:
            pack(options.runs, options.archive)
            print(f"archive: {options.archive}")
        options.page.write_text(page_of(cells_by_table, options), encoding="utf-8")
    except (UserError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"page: {options.page}; {sum(not finished(cell, options) for cell in cells)} runs are left")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
