"""Which runs are alike: made with the same settings but for the seed, and measured against the same full precision."""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bisup_lightning.errors import UserError
from bisup_lightning.report.run import Run

Settings = Mapping[str, Any]
HASHED = ("checkpoint", "theta_from")  # of many files each, whose digests a fingerprint holds by `checkpoint/NAME`
SHORT = re.compile(r"[\w.\-/ ]{1,40}")  # what can stand in a table as it is


def recipe(run: Run) -> dict[str, Any]:
    """All that a run's model depends on but the seed, by key; files by their content, wherever they lie."""
    fingerprint = run.results["fingerprint"]
    elsewhere = ("evaluation.", "text/", *(f"{name}/" for name in HASHED))
    settings = {key: value for key, value in fingerprint.items() if key != "seed" and not key.startswith(elsewhere)}
    source = fingerprint["data.calibration"]
    text = {"data.calibration": f"{Path(source).name} {_text(run, source) or ''}".strip()}
    return settings | text | {name: _files(run, name) for name in HASHED}


def prompt(run: Run) -> dict[str, Any]:
    """The settings of a run's prompt."""
    return {key: run.setting(key) for key in ("prompt.kind", "prompt.text")}


def told_apart(
    runs: Iterable[Run], place: Callable[[Run], Hashable], settings: Callable[[Run], Settings]
) -> Callable[[Run], str]:
    """A suffix for each run's name: ` (clip_lr 0.5)`, or nothing where those of the same place agree.

    Args:
        runs: Those to be told apart.
        place: What runs share that would otherwise stand for each other.
        settings: A run's, by key. Those in which runs of one place differ make up the suffix; null is not shown.
    """
    places: dict[Hashable, list[Settings]] = {}
    for run in runs:
        places.setdefault(place(run), []).append(settings(run))
    varied = dict.fromkeys(
        key for first, *others in places.values() for other in others for key in _differences(first, other)
    )

    def suffix(run: Run) -> str:
        own = settings(run)
        words = [f"{_short_key(key)} {_short(own[key])}" for key in varied if own.get(key) is not None]
        return f" ({', '.join(words)})" if words else ""

    return suffix


def check_measured_alike(runs: Sequence[Run]) -> None:
    """Refuse runs whose figures on a set of the same name do not compare.

    Raises:
        UserError: Naming two of them, and the keys that let their full-precision figures differ.
    """
    for part, conditions in (("perplexity", _perplexity_conditions), ("zero_shot", _zero_shot_conditions)):
        for name in dict.fromkeys(name for run in runs for name in run.results[part]):
            measured = [(run, conditions(run, name)) for run in runs if name in run.results[part]]
            for (first, ours), (second, theirs) in combinations(measured, 2):
                changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
                if changed and first.results[part][name]["fp"] != second.results[part][name]["fp"]:
                    differences = "; ".join(f"{key}: {ours[key]} → {theirs[key]}" for key in changed)
                    raise UserError(
                        f"{first.folder} and {second.folder} measured {name} differently ({differences}); "
                        "compare them apart, or measure both alike"
                    )


def _perplexity_conditions(run: Run, name: str) -> dict[str, Any]:
    """What full precision on a set depends on; two runs share the checkpoint's key if their models share a name."""
    sources = run.setting("evaluation.perplexity", [])
    source = next((source for source in sources if name in (source, Path(source).name)), name)
    return {
        "evaluation.seq_len": run.setting("evaluation.seq_len") or run.setting("data.seq_len"),
        "evaluation.max_chunks": run.setting("evaluation.max_chunks"),
        f"text {name}": _text(run, source),
        f"checkpoint {run.model_name}": _files(run, "checkpoint"),
        **({"seed": run.setting("seed")} if name == "self" else {}),  # with which that text is drawn
    }


def _zero_shot_conditions(run: Run, name: str) -> dict[str, Any]:
    """The same for a task."""
    source = next((task for task in run.setting("evaluation.zero_shot", []) if Path(task).stem == name), name)
    return {
        "evaluation.zero_shot_limit": run.setting("evaluation.zero_shot_limit"),
        f"text {name}": _text(run, source),
        f"checkpoint {run.model_name}": _files(run, "checkpoint"),
    }


def _differences(ours: Settings, theirs: Settings) -> list[str]:
    """Keys, where one that is not there is null."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def _text(run: Run, source: str) -> str | None:
    """The beginning of a text file's digest; None for a named set."""
    digest = run.setting(f"text/{source}")
    return digest and digest[:8]


def _files(run: Run, name: str) -> str | None:
    """One digest of all files of `HASHED`."""
    found = {key: value for key, value in run.results["fingerprint"].items() if key.startswith(f"{name}/")}
    return _digest(json.dumps(found, sort_keys=True)) if found else None


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def _short_key(key: str) -> str:
    """What the solver learns with goes by its name alone: `clip_lr`; the rest by the last two: `weights.symmetric`."""
    parts = [part for part in key.split(".") if part != "init_args"]
    return ".".join(parts[-1:] if parts[0] == "solver" else parts[-2:])


def _short(value: Any) -> str:
    """A value, or its digest if that is a long text or would disturb a table."""
    words = value if isinstance(value, str) else json.dumps(value)
    return words if SHORT.fullmatch(words) else _digest(words)
