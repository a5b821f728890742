"""Kills, full and broken disks, and damaged files, as many as one likes: `make faults`, or `python -m tests.faults`.

Every run that is disturbed must end, by the same command, in the bytes of a run that nothing disturbed.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.file_faults import broken_at, full_at, kill_at
from tests.inputs import fit_command, write_checkpoint, write_text
from tests.processes import Run
from tests.tools import BISUP, EAGER, GPTQ, QUAROT, Interrupt, contents, timeless, with_callback

KILLS_IN_A_RUN = 6
NEVER = 10**9
TIMED = ("config.yaml", "manifest.json", "metrics.json", "results.json", "report.html")  # hold the run's name, or times
HARMLESS = ("link", "unlink", "rmdir", "mkdir")  # what a run can do without; a folder may be there already


@dataclass
class Scenario:
    """A configuration, and what it gives undisturbed.

    Args:
        name: For messages.
        command: The command line, given a run_dir.
        whole: The run_dir of the undisturbed run.
        seconds: How long that took.
        operations: How many operations on its files it made.
    """

    name: str
    command: Callable[[Path], list[str]]
    whole: Path
    seconds: float
    operations: int

    def check(self, run: Path) -> None:
        """Let the same command go on undisturbed, and compare.

        Raises:
            AssertionError: If anything differs.
        """
        code, stderr = Run(self.command(run)).wait()
        assert code == 0, f"{self.name}: exit code {code} in {run}: {stderr}"
        self.compare(run)

    def compare(self, run: Path, lost: str = "") -> None:
        """See that a finished run holds what the undisturbed one does: models byte for byte, figures, no other file.

        Args:
            run: The run.
            lost: A file that may be missing.

        Raises:
            AssertionError: If anything differs.
        """
        found, expected = contents(run), contents(self.whole)
        found.pop("owner.json", None)  # of a process that was killed
        if lost not in found:
            expected.pop(lost, None)
        assert found.keys() == expected.keys(), f"{self.name}: {run} holds other files"
        different = [n for n in found if found[n] != expected[n] and Path(n).name not in TIMED]
        assert not different, f"{self.name}: {run} differs in {different}"
        assert timeless(run) == timeless(self.whole), f"{self.name}: {run} has other results"


def make_scenario(folder: Path, name: str, *settings: str) -> Scenario:
    """Run a configuration undisturbed."""
    checkpoint, text = folder / "checkpoint", folder / "text.txt"

    def command(run: Path) -> list[str]:
        return fit_command(checkpoint, run, text, *settings, with_callback(Interrupt))

    whole, record = folder / f"whole-{name}", folder / f"operations-{name}"
    started = time.monotonic()
    code, stderr = Run(command(whole), broken_at(whole, NEVER, record)).wait()
    assert code == 0, f"{name}: exit code {code}: {stderr}"
    return Scenario(name, command, whole, time.monotonic() - started, int(record.read_text().split()[0]))


# --- kills ------------------------------------------------------------------------------------------------------------


def kill_again_and_again(scenario: Scenario, run: Path, seed: int) -> tuple[int, int]:
    """Kill a run a few times at random moments or inside random operations on its files, then let it finish.

    Returns:
        How often it was killed from outside and inside of an operation.
    """
    dice = random.Random(seed)
    outside = inside = 0
    while outside + inside < KILLS_IN_A_RUN:
        within = dice.random() < 0.5
        if within:
            process = Run(scenario.command(run), kill_at(run, dice.randrange(scenario.operations)))
        else:
            process = Run(scenario.command(run))
            if not process.ends_within(dice.uniform(0, scenario.seconds)):
                process.signal(signal.SIGKILL)
        code, stderr = process.wait()
        if code != -signal.SIGKILL:
            assert code == 0, f"{scenario.name}: exit code {code} in {run}, seed {seed}: {stderr}"
            break
        inside, outside = inside + within, outside + (not within)
    scenario.check(run)
    shutil.rmtree(run)
    return outside, inside


def kills(folder: Path, scenarios: list[Scenario], number: int, seed: int, pool: ThreadPoolExecutor) -> None:
    """At least so many kills, in as many runs as that takes."""
    outside = inside = runs = 0
    while outside + inside < number:
        wanted = -(-(number - outside - inside) // KILLS_IN_A_RUN)
        places = [(scenarios[place % len(scenarios)], place) for place in range(runs, runs + wanted)]
        tasks = [pool.submit(kill_again_and_again, s, folder / f"kills-{p}", seed * 100_003 + p) for s, p in places]
        for task in tasks:
            more_outside, more_inside = task.result()
            outside, inside, runs = outside + more_outside, inside + more_inside, runs + 1
    print(
        f"kills: {outside + inside} ({inside} of them inside an operation on a file) in {runs} runs, seed {seed}; "
        f"every model/ equals the uninterrupted one",
        flush=True,
    )


# --- disks that are full or broken ------------------------------------------------------------------------------------


def assert_one_line(stderr: str) -> None:
    """See that a failure was said in one line that a person can read."""
    assert len(stderr.splitlines()) == 1, stderr
    assert re.match("error: .*(No space left|Input/output error)", stderr), stderr


def fail_once(scenario: Scenario, run: Path, at: int, fault: Callable[[Path, int, Path], Callable[[], None]]) -> str:
    """A run whose operation `at` fails, and the next one, on a mended disk.

    Returns:
        The kind of operation that failed.
    """
    record = run.with_name(f"{run.name}.operations")
    code, stderr = Run(scenario.command(run), fault(run, at, record)).wait()
    kind = record.read_text().split()[1]
    if code == 0:
        assert kind in HARMLESS, f"operation {at}, {kind}, failed and nobody cared"
        assert stderr == ""
    else:
        assert code == 2, f"operation {at}, {kind}: exit code {code}: {stderr}"
        assert_one_line(stderr)
    scenario.check(run)
    shutil.rmtree(run)
    record.unlink()
    return kind


def disks(folder: Path, scenario: Scenario, every: int, offset: int, pool: ThreadPoolExecutor) -> None:
    """Let one operation after another meet a full disk and a broken one."""
    for name, fault in (("ENOSPC", full_at), ("EIO", broken_at)):
        places = range(offset % every, scenario.operations, every)
        tasks = [pool.submit(fail_once, scenario, folder / f"{name}-{at}", at, fault) for at in places]
        kinds = [task.result() for task in tasks]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        print(f"{name}: at {len(places)} operations ({counts}); one line each, then the same bytes", flush=True)


# --- damaged files ----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Turn a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # a hard link of the file stays as it is
    path.write_bytes(content)


def flip_in_place(path: Path) -> None:
    """Turn a bit of the file and of every hard link to it."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def truncate(path: Path) -> None:
    """Lose the second half."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    """Lose all but the name."""
    path.unlink()
    path.touch()


DAMAGES = (flip, flip_in_place, truncate, empty, Path.unlink)


def damage_one(scenario: Scenario, source: Path, run: Path, name: str, damage: Callable[[Path], None]) -> None:
    """A copy of a run with one file damaged must be mended, or refused in one line if it is the manifest."""
    shutil.copytree(source, run, copy_function=_link_within(source, run))
    damage(run / name)
    code, stderr = Run(scenario.command(run)).wait()
    what = f"{damage.__name__} of {name}: "
    if name == "manifest.json":
        assert code == 2, what + f"exit code {code}: {stderr}"
        assert len(stderr.splitlines()) == 1, what + stderr
        assert re.match(r"error: run_dir: ", stderr), what + stderr
    else:
        assert code == 0, what + f"exit code {code}: {stderr}"
        # A finished model has no need of the blocks that it was put together from.
        scenario.compare(run, lost=name if source is scenario.whole and name.startswith("blocks/") else "")
    shutil.rmtree(run)


def _link_within(source: Path, run: Path) -> Callable[[str, str], None]:
    """Copies files as they are linked with each other: a model's shards are its finished blocks."""
    copied: dict[int, str] = {}

    def copy(old: str, new: str) -> None:
        inode = os.stat(old).st_ino
        if inode in copied:
            os.link(copied[inode], new)
        else:
            copied[inode] = new
            shutil.copy2(old, new)

    return copy


def damaged(folder: Path, scenario: Scenario, every: int, offset: int, pool: ThreadPoolExecutor) -> None:
    """Damage every file in turn, of a run that was killed inside a block and of a finished one."""
    killed = folder / "killed"
    process = Run(scenario.command(killed), environment={"INTERRUPT_AT": "on_train_epoch_end:1"})
    assert process.wait()[0] == -signal.SIGKILL
    (killed / "owner.json").unlink()
    for state, source in (("interrupted", killed), ("finished", scenario.whole)):
        cases = [(name, damage) for name in contents(source) for damage in DAMAGES][offset % every :: every]
        tasks = [
            pool.submit(damage_one, scenario, source, folder / f"damaged-{state}-{place}", name, damage)
            for place, (name, damage) in enumerate(cases)
        ]
        for task in tasks:
            task.result()
        files = len({name for name, _ in cases})
        print(f"damage: {len(cases)} to {files} files of a run that is {state}; mended or refused", flush=True)


# --- all together -----------------------------------------------------------------------------------------------------


def make_scenarios(folder: Path, short: bool, pool: ThreadPoolExecutor) -> list[Scenario]:
    """Solvers, transforms, and how often is saved."""
    kinds = {
        "bisup-eager": (BISUP, "--solver.epochs=2", EAGER),
        "bisup-quarot": (BISUP, "--solver.epochs=2", QUAROT),
        "gptq-quarot-eager": (GPTQ, QUAROT, EAGER),
        "gptq": (GPTQ,),
    }
    chosen = list(kinds.items())[: 2 if short else None]
    return list(pool.map(lambda item: make_scenario(folder, item[0], *item[1]), chosen))


def main(arguments: list[str] | None = None) -> int:
    """Run all of it, or a sample.

    Returns:
        0 if everything held; the first thing that did not is raised.
    """
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--every", type=int, default=1, help="disturb every n-th operation and file only")
    parser.add_argument("--seed", type=int, default=None, help="of all that is drawn; a new one each time by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args(arguments)
    seed = random.randrange(2**20) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="bisup-faults-"))
    (folder / "checkpoint").mkdir()
    write_checkpoint(folder / "checkpoint")
    write_text(folder / "text.txt")
    with ThreadPoolExecutor(options.jobs) as pool:
        scenarios = make_scenarios(folder, options.kills < 50, pool)
        kills(folder, scenarios, options.kills, seed, pool)
        disks(folder, scenarios[0], options.every, seed, pool)
        damaged(folder, scenarios[0], options.every, seed, pool)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
