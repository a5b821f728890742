"""What a finished run left behind, as a report needs it."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bisup_lightning.errors import UserError
from bisup_lightning.run_layout import ANALYSIS, CONFIG, EPOCH_LOGS, RESULTS

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Its run_dir.
        results: The content of results.json.
        epochs: What was logged while each block learned, one row for each epoch, by block; empty without logs.
        analysis: The content of analysis.json, where `analyze` has written it.
        config: The content of config.yaml.
    """

    folder: Path
    results: Mapping[str, Any]
    epochs: Mapping[int, Rows] = field(default_factory=dict)
    analysis: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run_dir.

        Raises:
            UserError: If it holds no finished run, or one that is damaged.
        """
        if not (folder / RESULTS).is_file():
            raise UserError(f"{folder} holds no finished run (no {RESULTS}); run fit with this run_dir first")
        analysis, config = folder / ANALYSIS, folder / CONFIG
        return cls(
            folder=folder,
            results=_read_json(
                folder / RESULTS, ("checkpoint", "fingerprint", "perplexity", "blocks"), "run fit again, which mends it"
            ),
            epochs={int(path.parent.name): _read_epochs(path) for path in sorted(folder.glob(EPOCH_LOGS))},
            analysis=_read_json(analysis, ("sets",), "run analyze again") if analysis.is_file() else {},
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
        )

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting of the run by its dotted key; `init_args` may be left out."""
        settings = self.results["fingerprint"]
        part, _, rest = key.partition(".")
        return settings.get(key, settings.get(f"{part}.init_args.{rest}", default))

    @property
    def model_name(self) -> str:
        """The last part of the checkpoint's name."""
        return Path(self.results["checkpoint"]).name

    def class_name(self, part: str) -> str:
        """Name of the class of the `solver` or the `transform`."""
        return str(self.setting(f"{part}.class_path")).rsplit(".", 1)[-1]


def precision_name(settings: Mapping[str, Any]) -> str:
    """The field's shorthand, such as W4A4KV4 or W3A3KV3-g128."""

    def bits(place: str) -> str:
        return str(settings.get(f"precision.{place}.bits", 16))

    group = settings.get("precision.weights.group_size")
    return f"W{bits('weights')}A{bits('activations')}KV{bits('kv')}" + (f"-g{group}" if group else "")


def _read_json(path: Path, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """An object that has these keys, among others."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in keys} | content
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def _read_epochs(path: Path) -> Rows:
    """Rows of a CSV log; where a block was learned twice, those of the last time."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and the report goes without its epochs") from error
    by_epoch: dict[float, dict[str, float]] = {}
    for row in rows:
        if "epoch" in row:
            by_epoch[row["epoch"]] = by_epoch.get(row["epoch"], {}) | row
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]
