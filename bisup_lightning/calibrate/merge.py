"""Assembles runs that calibrated some of a model's blocks each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bisup_lightning.calibrate.fit import fit
from bisup_lightning.calibrate.job import Job
from bisup_lightning.calibrate.measure import open_checkpoint
from bisup_lightning.calibrate.run_lock import RunLock
from bisup_lightning.calibrate.run_reader import RunReader, changes
from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.errors import UserError


def merge(runs: Sequence[Path], job: Job) -> dict[str, Any] | None:
    """Copy the blocks of several runs into one, and end it: audit, publish, measure.

    Args:
        runs: Directories of runs of `fit --parallel.mode independent --blocks first:end`.
        job: What they were all asked for, with the directory of the merged run.

    Returns:
        The content of its results.json.

    Raises:
        UserError: If they do not belong together, or a block is missing.
    """
    source: dict[int, RunReader] = {}
    fingerprint: Mapping[str, Any] = {}
    tokens_NT = prompt_ids = None
    for run in runs:
        reader = RunReader(run)
        progress = reader.join(independent=True)
        if reader.fingerprint.get("parallel.mode") != "independent":
            raise UserError(
                f"merge: the blocks of {run} depend on each other; run fit with --parallel.mode independent"
            )
        fingerprint = fingerprint or reader.fingerprint
        if keys := changes(fingerprint, reader.fingerprint)[0]:
            raise UserError(f"merge: {run} differs from {runs[0]} in {', '.join(keys)}; they do not belong together")
        tokens_NT = progress.tokens_NT if tokens_NT is None else tokens_NT
        prompt_ids = progress.prompt_ids if prompt_ids is None else prompt_ids
        if progress.prompt_ids not in (None, prompt_ids):
            raise UserError(
                f"merge: {run} stood behind another prompt than {runs[0]}, maybe of another day; they do not belong "
                "together. Give the prompt as a text (--prompt.kind text)"
            )
        source |= dict.fromkeys(progress.finished_blocks, reader)
    plain, _ = open_checkpoint(job.checkpoint, job.device)
    if missing := sorted(set(range(plain.num_layers)) - source.keys()):
        raise UserError(f"merge: no run has block {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}")
    if tokens_NT is None or prompt_ids is None:
        raise UserError(f"merge: {runs[0]} has lost its calibration text; run its fit again, which mends it")
    merged = RunStore(job.run_dir)
    with RunLock(job.run_dir) as lock:
        there = merged.open(fingerprint, independent=True).finished_blocks
        lock.claim()
        merged.begin(job.config_yaml, tokens_NT, prompt_ids)
        for index, reader in sorted(source.items()):
            if index not in there:
                block, metrics, theta = reader.read_block(index), reader.read_metrics(index), reader.read_theta(index)
                merged.save_block(index, block, metrics, theta=theta)
    return fit(replace(job, blocks=None))
