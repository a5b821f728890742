"""The run directory: finished blocks, the streams behind the last one, and the manifest that says what counts.

Order of writing: block folder, streams, manifest; each appears by rename. What the manifest does not name, does not
count.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bisup_lightning.errors import UserError
from bisup_lightning.files import sha256, write_json, write_tensors, write_text

MANIFEST, BLOCK, METRICS = "manifest.json", "block.safetensors", "metrics.json"


@dataclass
class Progress:
    """How far a run got: its finished blocks' metrics, the streams behind the last, and whether all is done."""

    metrics: list[dict[str, Any]]
    streams: dict[str, Tensor] | None
    finished: bool


class RunStore:
    """Reads and writes a run directory.

    Args:
        run_dir: The directory; made when first written to.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.manifest: dict[str, Any] = {"fingerprint": {}, "files": {}, "blocks": 0, "finished": False}

    def open(self, fingerprint: Mapping[str, Any]) -> Progress:
        """Continue what is there, or begin.

        Args:
            fingerprint: All that the result depends on, by name.

        Raises:
            UserError: If the directory holds something else, another run, or a damaged one.
        """
        path = self.run_dir / MANIFEST
        if not path.is_file():
            if self.run_dir.exists() and not self._is_blank():
                raise UserError(f"run_dir: {self.run_dir} is not empty and holds no run; name another directory")
            self.manifest["fingerprint"] = dict(fingerprint)
            return Progress([], None, False)
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
            recorded, finished = self.manifest["fingerprint"], self.manifest["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"run_dir: {path} is damaged; name another directory") from error
        self._refuse_difference(recorded, fingerprint)
        self._verify()
        count = self.manifest["blocks"]
        metrics = [json.loads((self.block_folder(index) / METRICS).read_text()) for index in range(count)]
        streams = None if finished or not count else load_file(self.streams_file(count - 1))
        return Progress(metrics, streams, finished)

    def _is_blank(self) -> bool:
        """Whether nothing but the beginnings of a first write lies here."""
        return self.run_dir.is_dir() and all(path.suffix == ".tmp" for path in self.run_dir.iterdir())

    def _refuse_difference(self, recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        changed = [key for key in {**recorded, **fingerprint} if recorded.get(key) != fingerprint.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {recorded.get(key)} → {fingerprint.get(key)}" for key in changed)
            raise UserError(
                f"run_dir: {self.run_dir} holds a run that differs in {differences}; name another directory"
            )

    def _verify(self) -> None:
        for name, digest in self.manifest["files"].items():
            path = self.run_dir / name
            if not path.is_file() or sha256(path) != digest:
                raise UserError(f"run_dir: {path} is missing or damaged; name another directory")

    def block_folder(self, index: int) -> Path:
        """Where block `index` lies."""
        return self.run_dir / "blocks" / f"{index:05d}"

    def streams_file(self, index: int) -> Path:
        """Where the streams behind block `index` lie."""
        return self.run_dir / "streams" / f"{index:05d}.safetensors"

    def begin(self, config_yaml: str) -> None:
        """Make the directory, claim it for this run, and write the resolved configuration."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._write_manifest()
        write_text(self.run_dir / "config.yaml", config_yaml)

    def save_block(
        self, index: int, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any], streams: Mapping[str, Tensor]
    ) -> None:
        """Record a finished block; the streams before it are dropped last.

        Raises:
            OSError: If something can't be written; the directory is as it was.
        """
        folder = self.block_folder(index)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_tensors(temporary / BLOCK, tensors)
        write_json(temporary / METRICS, metrics)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        self.streams_file(index).parent.mkdir(exist_ok=True)
        write_tensors(self.streams_file(index), streams)
        files = {name: digest for name, digest in self.manifest["files"].items() if not name.startswith("streams/")}
        for path in (folder / BLOCK, folder / METRICS, self.streams_file(index)):
            files[str(path.relative_to(self.run_dir))] = sha256(path)
        self._write_manifest(files=files, blocks=index + 1)
        if index:
            self.streams_file(index - 1).unlink(missing_ok=True)

    def finish(self) -> None:
        """Record that the model and the results are complete; the streams have served."""
        files = {name: digest for name, digest in self.manifest["files"].items() if not name.startswith("streams/")}
        for path in sorted((self.run_dir / "model").iterdir()):
            files[str(path.relative_to(self.run_dir))] = sha256(path)
        self._write_manifest(files=files, finished=True)
        shutil.rmtree(self.run_dir / "streams", ignore_errors=True)

    def _write_manifest(self, **changes: Any) -> None:
        manifest = {**self.manifest, **changes}
        write_json(self.run_dir / MANIFEST, manifest)
        self.manifest = manifest
