"""The run directory as it is found: what is finished, what resuming needs, and the manifest that says what counts.

A file is whole or absent, the manifest is written last and holds each file's SHA-256. What the manifest does not name
does not count; what it names and is gone or damaged is made again from what is left.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bisup_lightning.errors import UserError, first_line
from bisup_lightning.files import sha256
from bisup_lightning.run_layout import (
    BLOCK,
    CONFIG,
    FOLDERS,
    MANIFEST,
    METRICS,
    OWNER,
    RANK_MANIFESTS,
    RESULTS,
    THETA,
    TOKENS,
    block_file,
    manifest_file,
    of_kind,
    parse,
    streams_file,
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
        prompt_ids: Token ids of the prompt, or None likewise.
        streams_at: Behind how many of them the streams were saved last; 0 for never.
        partials: Where the training of unfinished blocks stopped, as far as it was saved.
        published: Whether `model/` is complete.
        finished: Whether the results are there, too.
        undamaged: Whether nothing that the run once wrote is lost.
        finished_blocks: Those that count: all before the first that is missing, and where blocks do not depend on each
            other, those behind it, too.
    """

    metrics: list[dict[str, Any]]
    tokens_NT: Tensor | None
    prompt_ids: list[int] | None
    streams_at: int
    partials: Mapping[int, Partial]
    published: bool
    finished: bool
    undamaged: bool
    finished_blocks: frozenset[int] = frozenset()


class RunReader:
    """Reads a run directory.

    Args:
        run_dir: The directory.
        rank: Of several processes that work there, the one whose view this is. The first keeps the manifest, the others
            one of their own each, which the first takes over in the end.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        self.run_dir = run_dir
        self.manifest = manifest_file(rank)
        self.files: dict[str, str] = {}  # SHA-256 by relative path
        self.fingerprint: dict[str, Any] = {}

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
            return Progress([], None, None, 0, {}, published=False, finished=False, undamaged=True)
        if resume == "never":
            raise UserError(f"resume: {self.run_dir} holds a run already; name a new run_dir, or drop --resume never")
        recorded, self.files = self._read_manifest()
        self._refuse_difference(recorded, fingerprint)
        if recorded != self.fingerprint:
            self.files.pop(CONFIG, None)  # it says what was to be measured before
        self._take_over()
        return self._survey(independent)

    def join(self, independent: bool = False, asked: Mapping[str, Any] | None = None) -> Progress:
        """Find out how far a run got that the first process has begun.

        Args:
            independent: Whether its blocks do not depend on each other.
            asked: Entries of the fingerprint of what this process was asked for; they must be the run's.

        Raises:
            UserError: If this process does not see it, or was asked for something else.
        """
        if not (self.run_dir / MANIFEST).is_file():
            raise UserError(
                f"run_dir: {self.run_dir} holds no run as seen from {socket.gethostname()}; "
                "several hosts need a directory that they share"
            )
        self.fingerprint, self.files = self._read_manifest()
        if asked is not None and (other := [key for key in asked if self.fingerprint.get(key) != asked[key]]):
            raise UserError(
                f"a process on {socket.gethostname()} was asked for something else than the first one "
                f"({differences(self.fingerprint, asked, other)}); give all the same command and checkpoint"
            )
        progress = self._survey(independent)
        self.files = {}  # the first process's; this one names its own
        return progress

    def open_finished(self) -> None:
        """Open a finished run, without a look at its files.

        Raises:
            UserError: If it is not finished.
        """
        if not (self.run_dir / RESULTS).is_file():
            raise UserError(f"{self.run_dir} holds no finished run (no {RESULTS}); run fit with this run_dir first")
        self.fingerprint, self.files = self._read_manifest()

    def open_published(self) -> None:
        """Open a run whose model is complete, measured or not, without a look at its files.

        Raises:
            UserError: If it is not.
        """
        if not (self.run_dir / MANIFEST).is_file():
            raise UserError(f"{self.run_dir} holds no run (no {MANIFEST}); run fit with this run_dir first")
        self.fingerprint, self.files = self._read_manifest()
        if not of_kind("model", self.files):
            raise UserError(f"{self.run_dir} holds no finished run (no model); run fit again, which goes on")

    def check_whole(self, part: str = "", remedy: str = "run fit again, which mends it") -> None:
        """See that nothing is lost of a run, or of its files whose names end in `part`.

        Raises:
            UserError: Naming what is.
        """
        for name, digest in self.files.items():
            if name.endswith(part) and not self._is_undamaged(name, digest):
                raise UserError(f"{self.run_dir / name} is missing or damaged; {remedy}")

    def check_blank(self) -> None:
        """Refuse a directory that holds anything but the beginnings of a first write.

        Raises:
            UserError: Naming it.
        """
        beginnings = (CONFIG, TOKENS, OWNER)
        if self.run_dir.exists() and not (
            self.run_dir.is_dir()
            and all(path.name in beginnings or path.suffix == ".tmp" for path in self.run_dir.iterdir())
        ):
            raise UserError(f"run_dir: {self.run_dir} is not empty and holds no run; name another directory")

    def _take_over(self) -> list[Path]:
        """Count the files that the other processes recorded; their manifests."""
        others = sorted(self.run_dir.glob(RANK_MANIFESTS))
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
            if manifest["sha256"] != digest_of(fingerprint, files):
                raise ValueError("its own SHA-256 does not fit")
            here = os.path.realpath(self.run_dir)
            for name in [*files, *FOLDERS]:
                if name in files and parse(name) is None:
                    raise ValueError(f"it names {name}, which no run writes")
                if os.path.realpath(self.run_dir / name) != os.path.join(here, name):
                    raise ValueError(f"{name} is a link that leads elsewhere")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"run_dir: {path} is damaged ({error}); name another directory") from error
        return fingerprint, files

    def _refuse_difference(self, recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        """What is to be measured may be another as long as nothing is."""
        changed, measured = changes(recorded, fingerprint)
        remedy = "name another directory"
        if (self.run_dir / RESULTS).is_file():
            remedy = remedy if changed else f"main.py test measures what it made anew, or {remedy}"
            changed += measured
        if changed:
            told = differences(recorded, fingerprint, changed)
            raise UserError(f"run_dir: {self.run_dir} holds a run that differs in {told}; {remedy}")

    def _survey(self, independent: bool) -> Progress:
        """What of the named files is undamaged, and how far that reaches. The rest is forgotten."""
        try:
            return self._survey_files(independent)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"run_dir: {self.run_dir} holds what no run writes ({error})") from error

    def _survey_files(self, independent: bool) -> Progress:
        undamaged = self._undamaged_files()
        model = of_kind("model", self.files).keys()
        published = bool(model) and model <= undamaged
        finished = published and RESULTS in undamaged
        complete = self._complete_blocks(undamaged)
        metrics = self._metrics_in_order(complete)
        finished_blocks = frozenset(complete if independent else range(len(metrics)))
        streams_at = self._latest_streams(undamaged, len(metrics))
        partials = {n for n, file in of_kind("partial", undamaged).items() if file.index not in finished_blocks}
        if finished:  # all stays; who wants to go on from a lost Θ shall hear of it
            keep = undamaged | of_kind("theta", self.files).keys()
        else:
            # Of a lost block on, all is made anew, as what follows was calibrated behind it; a finished model stays.
            keep = {CONFIG, TOKENS, streams_file(streams_at), *partials, *(model if published else ())}
            keep |= {block_file(index, part) for index in finished_blocks for part in (BLOCK, METRICS, THETA)}
            keep &= undamaged
        is_undamaged = undamaged == self.files.keys()
        self.files = {name: digest for name, digest in self.files.items() if name in keep}
        return Progress(
            metrics=metrics,
            tokens_NT=self.read_tokens() if TOKENS in undamaged else None,
            prompt_ids=self.read_prompt() if TOKENS in undamaged else None,
            streams_at=streams_at,
            partials=self._readable_partials(partials),
            published=published,
            finished=finished,
            undamaged=is_undamaged,
            finished_blocks=finished_blocks,
        )

    def _undamaged_files(self) -> set[str]:
        """Those of the named files that are what the manifest says; warns of the others."""
        undamaged = {name for name, digest in self.files.items() if self._is_undamaged(name, digest)}
        if lost := sorted(self.files.keys() - undamaged):
            what = f"{self.run_dir / lost[0]} is missing or damaged" + (f", and {len(lost) - 1} more" * (len(lost) > 1))
            log.warning(f"run_dir: {what}; making again what is still needed")
        return undamaged

    def _is_undamaged(self, name: str, digest: str) -> bool:
        path = self.run_dir / name
        return path.is_file() and sha256(path) == digest

    def _complete_blocks(self, undamaged: Set[str]) -> set[int]:
        """The blocks of which nothing is lost, wherever they are; one that had a Θ is lost with it."""
        complete = set()
        for index in {file.index for file in of_kind("block", undamaged).values()}:
            needed = {block_file(index, BLOCK), block_file(index, METRICS)}
            if needed | ({block_file(index, THETA)} & self.files.keys()) <= undamaged:
                complete.add(index)
        return complete

    def _metrics_in_order(self, complete: Set[int]) -> list[dict[str, Any]]:
        """Figures of the blocks from the first on, up to one that is not complete.

        Raises:
            ValueError: If some are not those of their block.
        """
        metrics: list[dict[str, Any]] = []
        while len(metrics) in complete:
            metrics.append(self.read_metrics(len(metrics)))
        if [block["index"] for block in metrics] != list(range(len(metrics))):
            raise ValueError("figures of other blocks")
        return metrics

    def _latest_streams(self, undamaged: Set[str], blocks: int) -> int:
        """Behind how many blocks the streams were saved last; 0 for never, or if not all of these are there.

        Raises:
            ValueError: If they are other streams than a run has.
        """
        streams_at = max((file.index for file in of_kind("streams", undamaged).values()), default=0)
        if not 0 < streams_at <= blocks:
            return 0
        with safe_open(self.run_dir / streams_file(streams_at), framework="pt") as streams:
            if set(streams.keys()) != {"x_fp", "x_q", "prompt"}:
                raise ValueError("other streams")
        return streams_at

    def _readable_partials(self, names: Iterable[str]) -> dict[int, Partial]:
        """The named checkpoints, by block; without those that are pickles that would run code."""
        partials = {}
        for name, file in sorted(of_kind("partial", names).items()):
            path = self.run_dir / name
            try:
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # whatever a foreign file makes the library stumble over
                log.warning(f"run_dir: {path} is no checkpoint that can be read ({first_line(error)}); not used")
            else:
                partials[file.index] = Partial(file.index, file.attempt, path)
        return partials

    def _text(self, name: str) -> str:
        return (self.run_dir / name).read_text(encoding="utf-8")

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads(self._text(RESULTS))

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of finished block `index`, by full name."""
        return load_file(self.run_dir / block_file(index, BLOCK))

    def read_tokens(self) -> Tensor:
        """The calibration text, token ids [N, T]."""
        return load_file(self.run_dir / TOKENS)["calibration"]

    def read_prompt(self) -> list[int] | None:
        """Token ids of the prompt, as they were when the run began; None if that is not known.

        A chat template may name the day, so that its text is another one later.
        """
        path = self.run_dir / TOKENS
        ids = load_file(path).get("prompt") if path.is_file() else None
        return None if ids is None else ids.tolist()

    def read_streams(self, blocks: int) -> dict[str, Tensor]:
        """Both streams and the prompt's hidden states behind the first `blocks` blocks."""
        return load_file(self.run_dir / streams_file(blocks))

    def read_theta(self, index: int) -> dict[str, Tensor] | None:
        """What was learned in a block, by name in it; None if it kept its start, or Θ was not kept."""
        path = self.run_dir / block_file(index, THETA)
        return load_file(path) if path.is_file() else None

    def read_metrics(self, index: int) -> dict[str, Any]:
        """The figures of a block."""
        return json.loads(self._text(block_file(index, METRICS)))

    def block_digests(self) -> dict[Path, str]:
        """SHA-256 of every finished block's tensors, by file, in order."""
        digests, index = {}, 0
        while (name := block_file(index, BLOCK)) in self.files:
            digests[self.run_dir / name] = self.files[name]
            index += 1
        return digests


def changes(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys in which two fingerprints differ: those that the model depends on, and those of what is measured alone."""
    text = f"text/{fingerprint.get('data.calibration')}"
    parts: tuple[list[str], list[str]] = [], []
    for key in {**recorded, **fingerprint}:
        if recorded.get(key) != fingerprint.get(key):
            parts[key.startswith("evaluation.") or (key.startswith("text/") and key != text)].append(key)
    return parts


def differences(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What an error says of keys in which two fingerprints differ."""
    return "; ".join(f"{key}: {recorded.get(key)} → {fingerprint.get(key)}" for key in keys)


def digest_of(fingerprint: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """SHA-256 of what a manifest says."""
    content = json.dumps([fingerprint, files], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()
