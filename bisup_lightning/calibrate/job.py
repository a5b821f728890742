"""What one run is asked for, and whether that can work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback

import bisup_lightning
from bisup_lightning.calibrate.driver import MakeTrainer, Memory
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.parallel import Parallel, Ranks
from bisup_lightning.calibrate.run_reader import Resume, RunReader
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.calibrate.solvers import BiSup, Solver
from bisup_lightning.data import corpus
from bisup_lightning.data.corpus import CalibrationData
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.data.streams import Streams
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.settings import Evaluation
from bisup_lightning.evaluate.zero_shot import check_zero_shot
from bisup_lightning.files import sha256
from bisup_lightning.model.block import check_scheme
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.quant.spec import Precision, Scheme
from bisup_lightning.run_layout import THETA
from bisup_lightning.transform.transform import Transform

Compile = Literal["auto", "always", "never"]
WORTH_COMPILING = 2e15  # operations of one forward pass over the text: what a model of 4 B has on 128 × 2048 tokens
MEANING_OF_THETA = ("seed", "precision.", "transform.", "solver.init_args.theta.", "data.", "prompt.", "checkpoint/")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "chat_template.*", "special_tokens_map.json")


@dataclass
class Job:
    """What `fit` was asked for.

    Args:
        checkpoint: Folder or hub id.
        run_dir: Where all output goes.
        precision: The quantizers.
        transform: What the model undergoes first.
        solver: How each block is solved.
        data: The calibration text.
        prompt: The high-precision prompt.
        evaluation: What is measured at the end.
        seed: Seed of all that is drawn.
        callbacks: What else happens during the walk.
        make_trainer: Makes a fresh Trainer from a block's index and a number of epochs.
        device: Where blocks compute.
        settings: The resolved configuration as far as the result depends on it, by key.
        config_yaml: The whole resolved configuration.
        resume: Whether to go on with what the run directory holds.
        compile: Whether blocks are compiled on a GPU.
        memory: Whether to save device memory at the cost of time.
        streams: Where the hidden states of the calibration text live.
        signals: What may ask the run to end.
        parallel: How several processes work at it.
        ranks: Those processes.
        blocks: `first:end` of the blocks to calibrate, if not all: part of a run that `merge` assembles.
    """

    checkpoint: str
    run_dir: Path
    precision: Precision
    transform: Transform
    solver: Solver
    data: CalibrationData
    prompt: Prompt
    evaluation: Evaluation
    seed: int
    callbacks: Sequence[Callback]
    make_trainer: MakeTrainer
    device: torch.device
    settings: Mapping[str, Any]
    config_yaml: str
    resume: Resume = "auto"
    compile: Compile = "auto"
    memory: Memory = "auto"
    streams: Streams = "auto"
    signals: Signals = field(default_factory=Signals)
    parallel: Parallel = field(default_factory=Parallel)
    ranks: Ranks = field(default_factory=Ranks)
    blocks: str | None = None

    @property
    def independent(self) -> bool:
        """Whether blocks do not depend on each other."""
        return self.parallel.mode == "independent"

    def arrangement(self) -> tuple[int, int]:
        """Stages of the run, and members of each.

        Raises:
            UserError: If so many processes can't be arranged.
        """
        data = self.data
        return self.parallel.arrange(self.ranks.world, self.solver.epochs, data.batch_size, data.num_samples)


def check(job: Job, plain: BlockwiseModel, scheme: Scheme) -> None:
    """Refuse what can be known to fail, before any work.

    Args:
        job: The job.
        plain: Its checkpoint at full precision, untransformed (as wherever the word stands below).
        scheme: What is quantized, once the model is transformed.

    Raises:
        UserError: Naming the key and the remedy.
    """
    try:
        check_scheme(plain.family, scheme)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_tokens(job, plain)
    check_rank(job.solver, plain.family.layer_shapes(0))
    plain.family.check_length("data.seq_len", job.data.seq_len)
    if (stages := job.arrangement()[0]) > plain.num_layers:
        raise UserError(
            f"parallel.mode: {stages} stages are more than the model's {plain.num_layers} blocks; start fewer"
        )
    if job.parallel.mode == "wavefront" and job.solver.fp_epochs != job.solver.epochs - 1:
        raise UserError(
            "solver.fp_epochs: in a wavefront all epochs but the last are on full-precision inputs; "
            f"leave it out, or give {job.solver.epochs - 1}"
        )
    if job.blocks is not None and not job.independent:
        raise UserError(
            "blocks: only blocks that do not depend on each other can be chosen; add --parallel.mode independent"
        )
    for source in job.evaluation.perplexity:
        corpus.check_source("evaluation.perplexity", source)
    check_zero_shot(job.evaluation, job.device)
    if not any(isinstance(callback, WalkCallback) and callback.saves_blocks for callback in job.callbacks):
        raise UserError(
            "trainer.callbacks: none saves the blocks; add callbacks.checkpoint.BlockCheckpoint as in configs/base.yaml"
        )


def check_tokens(job: Job, plain: BlockwiseModel) -> None:
    """Refuse a text too small for what the transform or the solver learn from it.

    Raises:
        UserError: With the number of tokens needed.
    """
    shapes = plain.family.layer_shapes(0)
    needed = max(shapes[f"{name}.weight"][1] for entry in LINEAR_INPUTS for name in entry.linears)
    tokens = job.data.num_samples * job.data.seq_len
    parts: dict[str, Transform | Solver] = {"transform": job.transform, "solver": job.solver}
    for key, part in parts.items():
        if part.needs_statistics and tokens < needed:
            raise UserError(
                f"{key}: {type(part).__name__} needs at least {needed} calibration tokens, one for each channel; "
                f"data.num_samples × data.seq_len is {tokens}"
            )


def check_rank(solver: Solver, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse matrices A and B of a higher rank than any weight has: they could learn nothing more.

    Args:
        solver: The solver.
        shapes: Of a block's tensors.

    Raises:
        UserError: With the highest rank.
    """
    most = max(min(shape) for shape in shapes.values() if len(shape) == 2)
    if isinstance(solver, BiSup) and solver.theta.low_rank != "none" and solver.theta.rank > most:
        raise UserError(f"solver.theta.rank: {solver.theta.rank} is above {most}, the highest that a weight can have")


def compiles(job: Job, plain: BlockwiseModel) -> bool:
    """Whether the walk runs compiled blocks: asked for, or so long that it makes up for the time that compiling takes.

    Not by itself with deterministic algorithms: a compiled run that is interrupted ends in other last bits.
    """
    if job.compile != "auto":
        return job.compile == "always"
    if torch.are_deterministic_algorithms_enabled():
        return False
    weights = plain.num_layers * sum(shape.numel() for shape in plain.family.layer_shapes(0).values())
    return 2 * weights * job.data.num_samples * job.data.seq_len >= WORTH_COMPILING


def fingerprint(job: Job, plain: BlockwiseModel) -> dict[str, Any]:
    """All that the result depends on: settings, model files, text files, code version, device type."""
    entries = {**job.settings, **checkpoint_digests(plain)}
    for source in {job.data.calibration, *job.evaluation.perplexity, *job.evaluation.zero_shot}:
        if Path(source).is_file():
            entries[f"text/{source}"] = sha256(Path(source))
    entries |= {"bisup_lightning": bisup_lightning.__version__, "device": job.device.type}
    return entries | (theta_to_start_from(job.solver.theta_from, entries) if job.solver.theta_from else {})


def checkpoint_digests(plain: BlockwiseModel) -> dict[str, str]:
    """Entries of a fingerprint for the files of the checkpoint."""
    folder = plain.checkpoint.folder
    tokenizer = (path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)))
    paths = [folder / "config.json", *tokenizer, *plain.checkpoint.shards]
    return {f"checkpoint/{path.name}": sha256(path) for path in paths}


def theta_to_start_from(run: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a fingerprint for the Θ that another run kept.

    Args:
        run: Its directory.
        entries: This run's own.

    Raises:
        UserError: If it kept none, or learned it for other quantizers, on another text or in another basis.
    """
    earlier = RunReader(run)
    try:
        earlier.open_finished()
        earlier.check_whole(THETA, "learn it anew in another run_dir")
    except UserError as error:
        raise UserError(f"solver.theta_from: {error}") from error
    if not earlier.fingerprint.get("solver.init_args.keep_theta"):
        raise UserError(f"solver.theta_from: {run} kept no Θ; run its fit with --solver.keep_theta true")
    meaning = (*MEANING_OF_THETA, f"text/{entries['data.calibration']}")
    shared = {key for key in {**earlier.fingerprint, **entries} if key.startswith(meaning)}
    if changed := sorted(key for key in shared if earlier.fingerprint.get(key) != entries.get(key)):
        raise UserError(f"solver.theta_from: {run} differs in {', '.join(changed)}; its Θ means something else there")
    return {f"theta_from/{name}": digest for name, digest in earlier.files.items() if name.endswith(THETA)}
