"""What a run would take: one block is calibrated on a few random sequences, the rest is arithmetic."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bisup_lightning.calibrate.block_trainer import BlockTrainer
from bisup_lightning.calibrate.budget import GIB, Budget, check_room, compute_dtype, free_disk_bytes
from bisup_lightning.calibrate.driver import BlockWalk, MakeTrainer
from bisup_lightning.calibrate.fit import calibration_tokens, compile_stance, make_walk, transformed_model
from bisup_lightning.calibrate.job import Job, check, fingerprint
from bisup_lightning.calibrate.measure import check_vocabulary, fetch_sets, open_checkpoint
from bisup_lightning.calibrate.parallel import Parallel, Ranks
from bisup_lightning.calibrate.run_reader import RunReader
from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.data.streams import free_host_bytes
from bisup_lightning.model.blockwise import BlockwiseModel


@dataclass(frozen=True)
class Forecast:
    """What a walk over all blocks is expected to take.

    Args:
        job: The job.
        budget: Its arithmetic.
        phases: Seconds of each part of a block's calibration.
        device: Peak of device memory in bytes; 0 on a CPU.
        host: Peak of host memory in bytes.
    """

    job: Job
    budget: Budget
    phases: Mapping[str, float]
    device: int
    host: int

    @property
    def seconds(self) -> float:
        """Time of the walk."""
        return self.budget.num_layers * sum(self.phases.values())

    def rows(self) -> list[tuple[str, str, str]]:
        """What, expected, free."""
        budget, (free_host, free_disk) = self.budget, (free_host_bytes(), free_disk_bytes(self.job.run_dir))
        rows = [
            (f"walk over {budget.num_layers} blocks", _clock(self.seconds), ""),
            ("a block", f"{sum(self.phases.values()):.2f} s", ""),
            *((f"  {phase}", f"{seconds:.2f} s", "") for phase, seconds in self.phases.items()),
        ]
        if budget.on_gpu:
            rows.append(("device memory", _size(self.device), _size(torch.cuda.mem_get_info(self.job.device)[0])))
        rows += [
            ("host memory", _size(self.host), "" if free_host is None else _size(free_host)),
            (f"  streams ({budget.place})", _size(budget.streams), ""),
            (f"disk of {self.job.run_dir}", _size(budget.disk), _size(free_disk)),
            ("  more if the streams are saved (see README)", _size(4 * budget.stream), ""),  # old ones go last
        ]
        return rows


def dry_run(job: Job) -> Forecast:
    """Calibrate the first block on one batch and on two; writes nothing.

    Raises:
        UserError: If something that the user gave can't be used, or the run can't fit.
    """
    plain, tokenizer = open_checkpoint(job.checkpoint, job.device)
    prompt_ids = job.prompt.ids(tokenizer, plain.family.config)
    scheme = job.transform.scheme(job.precision)
    check(job, plain, scheme)
    RunReader(job.run_dir).open(fingerprint(job, plain), job.resume, job.independent)  # refuses what `fit` would
    check_texts(job, plain, tokenizer)
    budget = Budget.of(job, plain, scheme)
    check_room(budget, job.device, job.run_dir)
    model = transformed_model(job, plain, None)
    model.dtype = compute_dtype(job, model)
    rehearsal = replace(  # one process, which leaves nothing behind
        job,
        callbacks=[],
        make_trainer=silent_trainers(job.device),
        parallel=Parallel(),
        ranks=Ranks(),
        streams="host" if budget.place == "file" else budget.place,
    )
    walk = make_walk(rehearsal, model, scheme, RunStore(job.run_dir), prompt_ids)
    few = [min(batches * job.data.batch_size, job.data.num_samples) for batches in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(plain.family.vocab_size, (few[1], job.data.seq_len), generator=generator)
    with walk, compile_stance(job, plain):
        calibrate(walk, tokens_NT[: few[0]])  # warms up
        one, two = (calibrate(walk, tokens_NT[:count]) for count in few)
    more = (job.data.num_samples - few[0]) / max(few[1] - few[0], 1)  # of what the second batch took
    rest = budget.streams * (job.data.num_samples - few[1]) // job.data.num_samples
    device = torch.cuda.max_memory_allocated(job.device) if budget.on_gpu else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Forecast(
        job=job,
        budget=budget,
        phases={phase: seconds + more * max(0.0, two[phase] - seconds) for phase, seconds in one.items()},
        device=device + rest * (budget.place == "device"),
        host=host + rest * (budget.place == "host"),
    )


def check_texts(job: Job, plain: BlockwiseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read all text but what the model would have to write itself.

    Raises:
        UserError: If some can't be had, or is too short.
    """
    sources = [source for source in job.evaluation.perplexity if source != "self"]
    fetch_sets(replace(job.evaluation, perplexity=sources), job.data.seq_len, job.seed, plain, tokenizer)
    if job.data.calibration != "self":
        check_vocabulary(calibration_tokens(job, plain.checkpoint.folder, tokenizer), plain)


def calibrate(walk: BlockWalk, tokens_NT: Tensor) -> Mapping[str, float]:
    """Calibrate the first block on token ids [N, T]; seconds of each part."""
    walk.begin(tokens_NT)
    return walk.calibrate(0).phases


def silent_trainers(device: torch.device) -> MakeTrainer:
    """Makes Trainers that write nothing."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return lambda index, epochs: BlockTrainer(device, epochs, accelerator=accelerator, logger=False)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
