"""Writes the run directory: a file is whole or absent, and the manifest, written last, says what counts."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisup_lightning.calibrate.run_reader import RunReader, digest_of
from bisup_lightning.files import publish, replacing, sha256, sync, write_json, write_tensors, write_text
from bisup_lightning.run_layout import (
    BLOCK,
    CONFIG,
    FOLDERS,
    METRICS,
    MODEL,
    PARTIAL,
    RANK_MANIFESTS,
    RESULTS,
    STREAMS,
    THETA,
    TOKENS,
    block_folder,
    partial_file,
    partial_prefix,
    streams_file,
)


class RunStore(RunReader):
    """Reads and writes a run directory, which is made when first written to; see `RunReader`."""

    def begin(self, config_yaml: str, tokens_NT: Tensor, prompt_ids: Sequence[int]) -> None:
        """Claim the directory for this run: the resolved configuration, calibration text and prompt, the manifest.

        On a run that goes on, drops what does not count.
        """
        for folder in FOLDERS:
            for path in sorted((self.run_dir / folder).rglob("*"), reverse=True):  # a folder after what it holds
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.run_dir).as_posix() not in self.files:
                    path.unlink()
        others = list(self.run_dir.glob(RANK_MANIFESTS))
        with self._recording() as files:
            if CONFIG not in files:
                write_text(self.run_dir / CONFIG, config_yaml)
            if TOKENS not in files:
                write_tensors(
                    self.run_dir / TOKENS, {"calibration": tokens_NT, "prompt": torch.tensor(prompt_ids).long()}
                )
            self._add(files, CONFIG, TOKENS)
        for path in others:  # whose files this manifest names by now
            path.unlink()

    def collect(self) -> None:
        """Record what the other processes wrote, who write no more."""
        others = self._take_over()
        with self._recording():
            pass
        for path in others:
            path.unlink()

    def save_partial(self, index: int, attempt: int, step: int, write: Callable[[Path], None]) -> None:
        """Record a checkpoint inside a block; the one before it of this block is dropped.

        Args:
            index: The block.
            attempt: Which try at training this is.
            step: Optimizer steps that the try has made.
            write: Writes the checkpoint at a path.

        Raises:
            OSError: If something can't be written; what was saved before still counts.
        """
        name = partial_file(index, attempt, step)
        (self.run_dir / name).parent.mkdir(exist_ok=True)
        with self._recording(partial_prefix(index)) as files:
            with replacing(self.run_dir / name) as temporary:
                write(temporary)
            self._add(files, name)

    def save_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        metrics: Mapping[str, Any],
        streams: Mapping[str, Tensor] | None = None,
        theta: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record a finished block, and the streams behind it if they are given; what they replace is dropped last.

        Args:
            index: Its place in the model.
            tensors: What the artifact holds of it, by full name.
            metrics: Its figures.
            streams: Both streams and the prompt's hidden states behind it.
            theta: What was learned in it, if that is kept.

        Raises:
            OSError: If something can't be written; what was saved before still counts.
        """
        name, streams_name = block_folder(index), streams_file(index + 1)
        folder = self.run_dir / name
        temporary = folder.with_name(folder.name + ".tmp")
        for leftover in (temporary, folder):  # of a try that the manifest did not live to see
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        with self._recording(partial_prefix(index), *([f"{STREAMS}/"] if streams is not None else [])) as files:
            write_tensors(temporary / BLOCK, tensors)
            write_json(temporary / METRICS, metrics)
            if theta is not None:
                write_tensors(temporary / THETA, theta)
            sync(temporary)
            publish(temporary, folder)
            self._add(files, *(f"{name}/{path.name}" for path in sorted(folder.iterdir())))
            if streams is not None:
                (self.run_dir / streams_name).parent.mkdir(exist_ok=True)
                write_tensors(self.run_dir / streams_name, streams)
                self._add(files, streams_name)

    def publish_model(self) -> None:
        """Record that `model/` is complete."""
        with self._recording(f"{MODEL}/") as files:
            self._add(files, *(f"{MODEL}/{path.name}" for path in sorted((self.run_dir / MODEL).iterdir())))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record the results; what only resuming needs is dropped."""
        with self._recording(f"{STREAMS}/", f"{PARTIAL}/") as files:
            write_json(self.run_dir / RESULTS, results)
            self._add(files, RESULTS)
        self.clear()

    def clear(self) -> None:
        """Drop what only resuming needs, of a finished run."""
        for folder in (STREAMS, PARTIAL):
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)

    @contextmanager
    def _recording(self, *replaced: str) -> Iterator[dict[str, str]]:
        """The named files, to be added to; then the manifest is written, then those beginning so before are dropped."""
        files = {name: digest for name, digest in self.files.items() if not name.startswith(replaced)}
        yield files
        manifest = {"fingerprint": self.fingerprint, "files": files, "sha256": digest_of(self.fingerprint, files)}
        write_json(self.run_dir / self.manifest, manifest)
        dropped, self.files = self.files.keys() - files.keys(), files
        for name in dropped:
            (self.run_dir / name).unlink(missing_ok=True)

    def _add(self, files: dict[str, str], *names: str) -> None:
        for name in names:
            files[name] = sha256(self.run_dir / name)
