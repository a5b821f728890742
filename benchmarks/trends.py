"""The paper's claims about its ablations, each decided by the numbers of finished runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean

from bisup_lightning.report.compare import budget, method, precision
from bisup_lightning.report.run import Run

Key = tuple[str, str, str, tuple[int, int, int]]  # precision, transform, what was done, budget
Value = Callable[[Run], float]


@dataclass
class Trend:
    """A claim with what speaks for it and against it.

    Args:
        claim: What the paper says.
        figure: How a figure is written.
        cases: Place, the figure that should be smaller, the one that should be larger, and whether their difference
            exceeds the spread over seeds.
    """

    claim: str
    figure: str = ".2f"
    cases: list[tuple[str, float, float, bool]] = field(default_factory=list)

    def verdict(self) -> str:
        """`holds`, `does not hold`, or in how many cases it does."""
        held = sum(smaller < larger for _, smaller, larger, _ in self.cases)
        if held == len(self.cases):
            return "holds"
        return f"holds in {held} of {len(self.cases)} cases" if held else "does not hold"

    def markdown(self) -> str:
        """The claim, the verdict, and every case with its figures."""
        shown = [
            f"{place}: {smaller:{self.figure}} {'<' if smaller < larger else '≥'} {larger:{self.figure}}"
            + ("" if clear else " (within the spread of the seeds)")
            for place, smaller, larger, clear in self.cases
        ]
        return f"- **{self.claim}: {self.verdict()}.** {'; '.join(shown)}.\n"


def trends_of(table: str, runs: Sequence[Run], name: str) -> list[Trend]:
    """The paper's claims about a table, as far as the runs can decide them.

    Args:
        table: `3`, `A11`, `A12`, `A13` or `A14`.
        runs: The table's runs.
        name: The set whose perplexity decides.
    """

    def perplexity(run: Run) -> float:
        return run.results["perplexity"][name]["quantized"]

    def rise(run: Run) -> float:
        """Over full precision behind the same prompt, in percent: a prompt helps full precision, too."""
        figures = run.results["perplexity"][name]
        return 100 * (figures["quantized"] / figures["fp_prompt"] - 1)

    if table == "3":
        steps = ("RTN", "FWAC", "FWAC + SWAS", "FWAC + SWAS + SLREC")
        trends = [
            _ordered(f"{after} is better than {before}", runs, perplexity, after, before)
            for before, after in pairwise(steps)
        ]
        prompt = _ordered("The exact prompt lessens the rise over full precision (%)", runs, rise, "BiSup", steps[-1])
        trends += [prompt, _ordered("BiSup is better than GPTQ", runs, perplexity, "BiSup", "GPTQ")]
        trends.append(_easier_precision_gains_less(runs, perplexity))
    elif table == "A11":
        trends = [
            _ordered("FWAC is better than WAC", runs, perplexity, "FWAC", "WAC"),
            _ordered(
                "SWAS is better than WAS (the paper: in most cases)", runs, perplexity, "FWAC + SWAS", "FWAC + WAS"
            ),
        ]
    elif table == "A12":
        trends = [
            _growing("More samples are better", runs, perplexity, part=0),
            _growing("More iterations are better", runs, perplexity, part=1),
        ]
    elif table == "A13":
        trends = [_growing("A higher rank is better", runs, perplexity, part=2)]
    else:
        trends = _cost_trends(runs)
    return [trend for trend in trends if trend.cases]


def _done(run: Run) -> str:
    """What was done, without the transform and the baseline it builds upon."""
    name = method(run)
    if name.endswith("BiSup"):
        return "BiSup"
    first, _, rest = name.partition(" + ")
    return rest or first.split()[-1].strip("()")


def _grouped(runs: Iterable[Run], value: Value) -> dict[Key, list[float]]:
    groups: dict[Key, list[float]] = {}
    for run in runs:
        key = (precision(run), run.class_name("transform"), _done(run), budget(run))
        groups.setdefault(key, []).append(value(run))
    return groups


def _case(place: str, smaller: list[float], larger: list[float]) -> tuple[str, float, float, bool]:
    spread = max(max(values) - min(values) for values in (smaller, larger))
    return place, mean(smaller), mean(larger), abs(mean(larger) - mean(smaller)) > spread


def _ordered(claim: str, runs: Sequence[Run], value: Value, better: str, worse: str) -> Trend:
    trend, groups = Trend(claim), _grouped(runs, value)
    found = {key[:3]: values for key, values in groups.items()}
    for bits, transform, done in found:
        other = found.get((bits, transform, worse))
        if done == better and other:
            trend.cases.append(_case(f"{bits} {transform}", found[bits, transform, done], other))
    return trend


def _growing(claim: str, runs: Sequence[Run], value: Value, part: int) -> Trend:
    """Each step up in one part of the budget, with the other parts as they are."""
    trend, groups = Trend(claim), _grouped(runs, value)
    lines: dict[tuple[object, ...], list[tuple[int, list[float]]]] = {}
    for (bits, transform, _, spent), values in groups.items():
        rest = tuple(amount for place, amount in enumerate(spent) if place != part)
        lines.setdefault((bits, transform, *rest), []).append((spent[part], values))
    letters = [letter for place, letter in enumerate("SIR") if place != part]
    for (bits, transform, *rest), steps in lines.items():
        steps.sort(key=lambda step: step[0])
        fixed = ", ".join(f"{letter} {amount}" for letter, amount in zip(letters, rest, strict=True))
        for (low, before), (high, after) in pairwise(steps):
            trend.cases.append(_case(f"{bits} {transform} ({fixed}), {low} → {high}", after, before))
    return trend


def _easier_precision_gains_less(runs: Sequence[Run], value: Value) -> Trend:
    trend = Trend("BiSup gains less over GPTQ at W4A4-g128 than elsewhere (%)")
    groups = {key[:3]: mean(values) for key, values in _grouped(runs, value).items()}
    gains: dict[str, dict[str, float]] = {}
    for bits, transform, done in groups:
        gptq = groups.get((bits, transform, "GPTQ"))
        if done == "BiSup" and gptq:
            gains.setdefault(transform, {})[bits] = 100 * (1 - groups[bits, transform, done] / gptq)
    for transform, by_bits in gains.items():
        for bits, gain in by_bits.items():
            if "W4A4-g128" in by_bits and bits != "W4A4-g128":
                trend.cases.append((f"{transform}, against {bits}", by_bits["W4A4-g128"], gain, True))
    return trend


def _cost_trends(runs: Sequence[Run]) -> list[Trend]:
    """Time grows with samples and iterations as they do and not with the rank; memory with the samples alone."""

    def memory(run: Run) -> float:
        return float(run.results["peak_device_bytes"] or run.results["peak_host_bytes"])

    seconds, peak = (_grouped(runs, value) for value in (lambda run: run.results["seconds"], memory))
    trends = [
        Trend("Time grows in proportion to the samples (off by less than 20 %)"),
        Trend("Time grows in proportion to the iterations (off by less than 20 %)"),
        Trend("Time does not depend on the rank (within 10 %)"),
        Trend("Memory grows with the samples (MiB)", ".0f"),
        Trend("Memory does not depend on the iterations (within 1 %)"),
        Trend("Memory hardly depends on the rank (within 1 %)"),
    ]
    for part, time_trend, memory_trend in ((0, 0, 3), (1, 1, 4), (2, 2, 5)):
        for place, low, high in _pairs(seconds, part):
            ratio = mean(seconds[high]) / mean(seconds[low])
            wanted, most = (1.0, 10.0) if part == 2 else (high[3][part] / low[3][part], 20.0)
            trends[time_trend].cases.append((place, 100 * abs(ratio / wanted - 1), most, True))
            before, after = mean(peak[low]), mean(peak[high])
            if part == 0:
                trends[memory_trend].cases.append((place, before / 2**20, after / 2**20, True))
            else:
                trends[memory_trend].cases.append((place, 100 * abs(after / before - 1), 1.0, True))
    return trends


def _pairs(groups: Mapping[Key, object], part: int) -> Iterable[tuple[str, Key, Key]]:
    """Neighbours that differ in one part of the budget alone."""
    for low in groups:
        for high in groups:
            same = [a == b for a, b in zip(low[3], high[3], strict=True)]
            if low[:3] == high[:3] and low[3][part] < high[3][part] and sum(same) == len(same) - 1 and not same[part]:
                spent = [" – ".join(map(str, key[3])) for key in (low, high)]
                yield f"{low[0]} {low[1]}, {spent[0]} → {spent[1]}", low, high
