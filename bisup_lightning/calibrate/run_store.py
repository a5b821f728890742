"""The run directory: what is finished, what resuming needs, and the manifest that says what counts.

A file is whole or absent, the manifest is written last and holds each file's SHA-256. What the manifest does not name
does not count; what it names and is gone or damaged is made again from what is left.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bisup_lightning.errors import UserError
from bisup_lightning.files import publish, replacing, sha256, sync, write_json, write_tensors, write_text

MANIFEST, CONFIG, RESULTS, TOKENS = "manifest.json", "config.yaml", "results.json", "tokens.safetensors"
BLOCK, METRICS = "block.safetensors", "metrics.json"
FOLDERS = ("blocks", "streams", "partial", "fronts", "model")
NAMES = re.compile(  # all that a manifest may speak of
    r"config\.yaml|results\.json|tokens\.safetensors|blocks/\d{5}/(block\.safetensors|metrics\.json)"
    r"|streams/\d{5}\.safetensors|partial/\d{5}-\d+-\d+\.ckpt|fronts/[\dx-]+\.ckpt|model/(?!\.\.?$)[^/]+"
)

Resume = Literal["auto", "never", "must"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """A checkpoint inside a block.

    Args:
        index: The block.
        attempt: Which try at training it belongs to, from 0.
        path: Lightning's checkpoint.
    """

    index: int
    attempt: int
    path: Path


@dataclass(frozen=True)
class Progress:
    """How far a run got.

    Args:
        metrics: Figures of the finished blocks, in order.
        tokens_NT: The calibration text, or None if it must be made.
        streams: Both streams and the prompt's hidden states behind the first `streams_at` blocks; None for the
            embedded text behind none.
        streams_at: See `streams`.
        partial: Where the next block's training stopped, if it was saved.
        published: Whether `model/` is complete.
        finished: Whether the results are there, too.
        whole: Whether nothing that the run once wrote is lost.
        scattered: All finished blocks, if they do not depend on each other.
        fronts: Names of the checkpoints that blocks wrote while they learned side by side.
    """

    metrics: list[dict[str, Any]]
    tokens_NT: Tensor | None
    streams: dict[str, Tensor] | None
    streams_at: int
    partial: Partial | None
    published: bool
    finished: bool
    whole: bool
    scattered: frozenset[int] = frozenset()
    fronts: tuple[str, ...] = ()


class RunStore:
    """Reads and writes a run directory.

    Args:
        run_dir: The directory; made when first written to.
        rank: Of several processes that work there, the one that writes. The first keeps the manifest, the others one of
            their own each, which the first takes over in the end.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        self.run_dir = run_dir
        self.manifest = f"manifest-{rank:05d}.json" if rank else MANIFEST
        self.files: dict[str, str] = {}  # SHA-256 by relative path
        self.fingerprint: dict[str, Any] = {}

    # --- reading ---

    def open(self, fingerprint: Mapping[str, Any], resume: Resume = "auto", independent: bool = False) -> Progress:
        """Find out how far a run got. Writes nothing.

        Args:
            fingerprint: All that the result depends on, by name.
            resume: `auto` goes on with what is there or begins; `never` wants a new or empty directory; `must` wants
                something to go on with.
            independent: Whether a block counts though one before it does not.

        Raises:
            UserError: If the directory holds something else, another run, or does not suit `resume`.
        """
        self.fingerprint = dict(fingerprint)
        if not (self.run_dir / MANIFEST).is_file():
            if resume == "must":
                raise UserError(f"resume: {self.run_dir} holds no run to go on with; drop --resume must to begin one")
            self.check_blank()
            return Progress([], None, None, 0, None, published=False, finished=False, whole=True)
        if resume == "never":
            raise UserError(f"resume: {self.run_dir} holds a run already; name a new run_dir, or drop --resume never")
        recorded, self.files = self._read_manifest()
        self._refuse_difference(recorded, fingerprint)
        self._take_over()
        return self._survey(independent)

    def join(self, independent: bool = False) -> Progress:
        """Find out how far a run got that the first process has begun.

        Raises:
            UserError: If this process does not see it.
        """
        if not (self.run_dir / MANIFEST).is_file():
            raise UserError(
                f"run_dir: {self.run_dir} holds no run as seen from {socket.gethostname()}; "
                "several hosts need a directory that they share"
            )
        self.fingerprint, self.files = self._read_manifest()
        progress = self._survey(independent)
        self.files = {}  # the first process's; this one names its own
        return progress

    def check_finished(self) -> None:
        """See that a run is finished and whole.

        Raises:
            UserError: If it is not.
        """
        if not (self.run_dir / RESULTS).is_file():
            raise UserError(f"{self.run_dir} holds no finished run (no {RESULTS}); run fit with this run_dir first")
        _, files = self._read_manifest()
        for name, digest in files.items():
            if not self._is_whole(name, digest):
                raise UserError(f"{self.run_dir / name} is missing or damaged; run fit again, which mends it")

    def check_blank(self) -> None:
        """Refuse a directory that holds anything but the beginnings of a first write.

        Raises:
            UserError: Naming it.
        """
        beginnings = (CONFIG, TOKENS, "owner.json")
        if self.run_dir.exists() and not (
            self.run_dir.is_dir()
            and all(path.name in beginnings or path.suffix == ".tmp" for path in self.run_dir.iterdir())
        ):
            raise UserError(f"run_dir: {self.run_dir} is not empty and holds no run; name another directory")

    def _take_over(self) -> list[Path]:
        """Count the files that the other processes recorded; their manifests."""
        others = sorted(self.run_dir.glob("manifest-*.json"))
        for path in others:
            recorded, files = self._read_manifest(path.name)
            self._refuse_difference(recorded, self.fingerprint)
            self.files |= files
        return others

    def _read_manifest(self, name: str = MANIFEST) -> tuple[dict[str, Any], dict[str, str]]:
        path = self.run_dir / name
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, files = dict(manifest["fingerprint"]), dict(manifest["files"])
            if manifest["sha256"] != _digest(fingerprint, files):
                raise ValueError("its own SHA-256 does not fit")
            here = os.path.realpath(self.run_dir)
            for name in [*files, *FOLDERS]:
                if name in files and not NAMES.fullmatch(name):
                    raise ValueError(f"it names {name}, which no run writes")
                if os.path.realpath(self.run_dir / name) != os.path.join(here, name):
                    raise ValueError(f"{name} is a link that leads elsewhere")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"run_dir: {path} is damaged ({error}); name another directory") from error
        return fingerprint, files

    def _refuse_difference(self, recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        changed = [key for key in {**recorded, **fingerprint} if recorded.get(key) != fingerprint.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {recorded.get(key)} → {fingerprint.get(key)}" for key in changed)
            raise UserError(
                f"run_dir: {self.run_dir} holds a run that differs in {differences}; name another directory"
            )

    def _survey(self, independent: bool) -> Progress:
        """What of the named files is whole, and how far that reaches. The rest is forgotten."""
        try:
            return self._survey_files(independent)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"run_dir: {self.run_dir} holds what no run writes ({error})") from error

    def _survey_files(self, independent: bool) -> Progress:
        whole = {name for name, digest in self.files.items() if self._is_whole(name, digest)}
        if lost := sorted(self.files.keys() - whole):
            what = f"{self.run_dir / lost[0]} is missing or damaged" + (f", and {len(lost) - 1} more" * (len(lost) > 1))
            log.warning(f"run_dir: {what}; making again what is still needed")
        model = {name for name in self.files if name.startswith("model/")}
        published = bool(model) and model <= whole
        finished = published and RESULTS in whole
        blocks = 0
        while {f"blocks/{blocks:05d}/{name}" for name in (BLOCK, METRICS)} <= whole:
            blocks += 1
        scattered = {i for i in map(_block, whole) if {f"blocks/{i:05d}/{name}" for name in (BLOCK, METRICS)} <= whole}
        metrics = [self.read_metrics(index) for index in range(blocks)]
        if [block["index"] for block in metrics] != list(range(blocks)):
            raise ValueError("figures of other blocks")
        streams_at = max((_number(name) for name in whole if name.startswith("streams/")), default=0)
        streams_at = streams_at if streams_at <= blocks else 0
        kept = scattered if independent else range(blocks)
        # Of a lost block on, all is made anew, as what follows was calibrated behind it; a finished model stays.
        keep = {CONFIG, TOKENS, self._streams_name(streams_at)} | (model if published else set())
        keep |= {f"blocks/{index:05d}/{name}" for index in kept for name in (BLOCK, METRICS)}
        keep |= {name for name in whole if name.startswith((f"partial/{blocks:05d}-", "fronts/"))}
        keep = whole if finished else whole & keep
        self.files = {name: digest for name, digest in self.files.items() if name in keep}
        return Progress(
            metrics=metrics,
            tokens_NT=load_file(self.run_dir / TOKENS)["calibration"] if TOKENS in keep else None,
            streams=load_file(self.run_dir / self._streams_name(streams_at)) if streams_at else None,
            streams_at=streams_at,
            partial=self._partial(blocks),
            published=published,
            finished=finished,
            whole=not lost,
            scattered=frozenset(kept),
            fronts=tuple(sorted(PurePosixPath(name).stem for name in self.files if name.startswith("fronts/"))),
        )

    def _is_whole(self, name: str, digest: str) -> bool:
        path = self.run_dir / name
        return path.is_file() and sha256(path) == digest

    def _text(self, name: str) -> str:
        return (self.run_dir / name).read_text(encoding="utf-8")

    def _partial(self, index: int) -> Partial | None:
        """The checkpoint inside a block, if there is one, and if it is no pickle that would run code."""
        for name in (name for name in self.files if name.startswith(f"partial/{index:05d}-")):
            path = self.run_dir / name
            try:
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # whatever a foreign file makes the library stumble over
                log.warning(f"run_dir: {path} is no checkpoint that can be read ({_first_line(error)}); not used")
            else:
                return Partial(index, int(PurePosixPath(name).stem.split("-")[1]), path)
        return None

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads(self._text(RESULTS))

    def block_file(self, index: int) -> Path:
        """The tensors of finished block `index`."""
        return self.run_dir / "blocks" / f"{index:05d}" / BLOCK

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Those tensors, by full name."""
        return load_file(self.block_file(index))

    def read_metrics(self, index: int) -> dict[str, Any]:
        """Its figures."""
        return json.loads(self._text(f"blocks/{index:05d}/{METRICS}"))

    def block_digests(self) -> dict[Path, str]:
        """SHA-256 of every finished block's tensors, by file, in order."""
        digests, index = {}, 0
        while (name := f"blocks/{index:05d}/{BLOCK}") in self.files:
            digests[self.run_dir / name] = self.files[name]
            index += 1
        return digests

    @staticmethod
    def _streams_name(blocks: int) -> str:
        """Where the streams behind the first `blocks` blocks lie."""
        return f"streams/{blocks:05d}.safetensors"

    # --- writing ---

    def begin(self, config_yaml: str, tokens_NT: Tensor) -> None:
        """Claim the directory for this run: the resolved configuration, the calibration text, the manifest.

        On a run that goes on, drops what does not count.
        """
        for folder in FOLDERS:
            for path in sorted((self.run_dir / folder).rglob("*"), reverse=True):  # a folder after what it holds
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.run_dir).as_posix() not in self.files:
                    path.unlink()
        others = list(self.run_dir.glob("manifest-*.json"))
        with self._recording() as files:
            if CONFIG not in files:
                write_text(self.run_dir / CONFIG, config_yaml)
            if TOKENS not in files:
                write_tensors(self.run_dir / TOKENS, {"calibration": tokens_NT})
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

    def rewind(self, blocks: int, fronts: Iterable[str]) -> None:
        """Let no more than the first so many blocks count, and those checkpoints of fronts."""
        wanted = {f"fronts/{name}.ckpt" for name in fronts}
        for name in [name for name in self.files if name.startswith(("blocks/", "fronts/"))]:
            if name not in wanted and not 0 <= _block(name) < blocks:
                del self.files[name]

    def save_front(self, name: str, replaced: str, write: Callable[[Path], None]) -> None:
        """Record where this process stands while blocks learn side by side.

        Args:
            name: A file name without its ending.
            replaced: Beginning of the names that it makes superfluous.
            write: Writes the checkpoint at a path.

        Raises:
            OSError: If something can't be written; what was saved before still counts.
        """
        name = f"fronts/{name}.ckpt"
        (self.run_dir / name).parent.mkdir(exist_ok=True)
        with self._recording(f"fronts/{replaced}") as files:
            with replacing(self.run_dir / name) as temporary:
                write(temporary)
            self._add(files, name)

    def save_partial(self, index: int, attempt: int, step: int, write: Callable[[Path], None]) -> None:
        """Record a checkpoint inside a block; the one before it is dropped.

        Args:
            index: The block.
            attempt: Which try at training this is.
            step: Optimizer steps that the try has made.
            write: Writes the checkpoint at a path.

        Raises:
            OSError: If something can't be written; what was saved before still counts.
        """
        name = f"partial/{index:05d}-{attempt}-{step:06d}.ckpt"
        (self.run_dir / name).parent.mkdir(exist_ok=True)
        with self._recording("partial/") as files:
            with replacing(self.run_dir / name) as temporary:
                write(temporary)
            self._add(files, name)

    def save_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        metrics: Mapping[str, Any],
        streams: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record a finished block, and the streams behind it if they are given; what they replace is dropped last.

        Raises:
            OSError: If something can't be written; what was saved before still counts.
        """
        name, streams_name = f"blocks/{index:05d}", self._streams_name(index + 1)
        folder = self.run_dir / name
        temporary = folder.with_name(folder.name + ".tmp")
        for leftover in (temporary, folder):  # of a try that the manifest did not live to see
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        with self._recording("partial/", *(["streams/"] if streams is not None else [])) as files:
            write_tensors(temporary / BLOCK, tensors)
            write_json(temporary / METRICS, metrics)
            sync(temporary)
            publish(temporary, folder)
            self._add(files, f"{name}/{BLOCK}", f"{name}/{METRICS}")
            if streams is not None:
                (self.run_dir / streams_name).parent.mkdir(exist_ok=True)
                write_tensors(self.run_dir / streams_name, streams)
                self._add(files, streams_name)

    def publish_model(self) -> None:
        """Record that `model/` is complete."""
        with self._recording("model/") as files:
            self._add(files, *(f"model/{path.name}" for path in sorted((self.run_dir / "model").iterdir())))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record the results; what only resuming needs is dropped."""
        with self._recording("streams/", "partial/", "fronts/") as files:
            write_json(self.run_dir / RESULTS, results)
            self._add(files, RESULTS)
        self.clear()

    def clear(self) -> None:
        """Drop what only resuming needs, of a finished run."""
        for folder in ("streams", "partial", "fronts"):
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)

    @contextmanager
    def _recording(self, *replaced: str) -> Iterator[dict[str, str]]:
        """The named files, to be added to; then the manifest is written, then those beginning so before are dropped."""
        files = {name: digest for name, digest in self.files.items() if not name.startswith(replaced)}
        yield files
        manifest = {"fingerprint": self.fingerprint, "files": files, "sha256": _digest(self.fingerprint, files)}
        write_json(self.run_dir / self.manifest, manifest)
        dropped, self.files = self.files.keys() - files.keys(), files
        for name in dropped:
            (self.run_dir / name).unlink(missing_ok=True)

    def _add(self, files: dict[str, str], *names: str) -> None:
        for name in names:
            files[name] = sha256(self.run_dir / name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _block(name: str) -> int:
    """The block that a file belongs to; −1 for none."""
    path = PurePosixPath(name)
    return int(path.parent.name) if path.parts[0] == "blocks" else -1


def _number(name: str) -> int:
    return int(PurePosixPath(name).stem)


def _digest(fingerprint: Mapping[str, Any], files: Mapping[str, str]) -> str:
    content = json.dumps([fingerprint, files], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()
