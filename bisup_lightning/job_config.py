"""Makes jobs from configurations: those that `fit` is given, and those that runs have recorded.

What lies below knows of no configuration: it gets the objects that one describes.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bisup_lightning.calibrate.block_trainer import BlockTrainer
from bisup_lightning.calibrate.checkpoint_io import WholeFileIO
from bisup_lightning.calibrate.driver import MakeTrainer
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.job import Job
from bisup_lightning.calibrate.measure import published_model
from bisup_lightning.calibrate.parallel import Ranks
from bisup_lightning.calibrate.run_reader import CONFIG
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.configuration import check_file, flatten, root_message
from bisup_lightning.errors import UserError
from bisup_lightning.parsers import fit_parser
from bisup_lightning.quant.spec import QuantSpec

# Prefixes of the keys that stay out of a run's fingerprint, so that they may change when the run goes on: they do not
# change the model, or they name files (checkpoint, theta_from) whose digests are in the fingerprint instead. `make_job`
# makes one exception: independent blocks are another model.
OUTSIDE_FINGERPRINT = (
    "config", "run_dir", "checkpoint", "resume", "dry_run", "streams", "parallel", "blocks", "trainer.logger",
    "trainer.callbacks", "trainer.profiler", "trainer.devices", "solver.init_args.theta_from", "evaluation.devices",
)  # fmt: skip


def device_for(accelerator: Any, key: str = "accelerator") -> torch.device:
    """The device of Lightning's accelerator name, given for a key."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"{key}: {accelerator} is not supported; choose auto, cpu, gpu or cuda")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}: {accelerator} is asked for, but torch sees no CUDA device; use cpu or auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def trainer_factory(
    settings: Namespace, callbacks: Sequence[Callback], logs: Path | None, device: torch.device
) -> MakeTrainer:
    """Makes a fresh Trainer for each block, with its own log under `logs` and fresh copies of foreign callbacks."""
    own = {key: value for key, value in vars(settings).items() if key not in ("callbacks", "logger", "devices")}

    def make(index: int, epochs: int) -> Trainer:
        logger = settings.logger if logs is not None else False
        if logs is not None and logger in (None, True):
            logger = [kind(logs, name="", version=f"{index:05d}") for kind in (CSVLogger, TensorBoardLogger)]
        return BlockTrainer(
            device,
            epochs,
            **own,
            logger=logger,
            callbacks=[c if isinstance(c, WalkCallback) else copy.deepcopy(c) for c in callbacks],
            log_every_n_steps=1,
            plugins=[WholeFileIO(), LightningEnvironment()],
        )

    return make


def check_values(config: Namespace) -> None:
    """Check values whose classes cannot name their configuration key.

    Raises:
        UserError: If one is impossible, naming its key.
    """
    if config.solver is None:
        raise UserError("solver: none is given; begin with --config configs/base.yaml, or give BiSup, GPTQ or RTN")
    for place in ("weights", "activations", "kv"):
        if (spec := config.precision[place]) is not None:
            try:
                QuantSpec(**vars(spec))
            except ValueError as error:
                raise UserError(f"precision.{place}.{error}") from error
    for key, value in flatten(config.clone(with_meta=False).as_dict()).items():
        if key.endswith("seed") and not 0 <= value < 2**62:
            raise UserError(f"{key} must lie in [0, 2^62), not {value}")
        if isinstance(value, int | float) and not key.endswith("seed") and not abs(value) < 2**31:
            raise UserError(f"{key} must lie below 2^31, not {value}")
    process_count(config)
    if (clip := config.trainer.gradient_clip_val) is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val must be 0 or more, not {clip}")


def process_count(config: Namespace) -> int:
    """How many processes are to be started on this host.

    Raises:
        UserError: If it has no devices for so many, or they have nothing to do.
    """
    wanted, mode = config.trainer.devices, config.parallel.mode
    on_gpu = device_for(config.trainer.accelerator, "trainer.accelerator").type == "cuda"
    there = torch.cuda.device_count() if on_gpu else None
    if wanted == "auto":
        return 1 if mode == "none" or there is None else there
    try:
        count = int(wanted)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"trainer.devices must be a number of devices or auto, not {wanted}")
    if there is not None and count > there:
        raise UserError(f"trainer.devices: {count} are asked for, but this host has {there}")
    if count > 1 and mode == "none":
        raise UserError(f"parallel.mode: choose data, wavefront or independent for {count} devices")
    return count


def resolve_fp_epochs(config: Namespace) -> None:
    """Put the number of epochs on full-precision inputs in place of a null, which leaves it to parallel.mode.

    So the run's fingerprint and its config.yaml hold the number itself.

    Raises:
        UserError: If one is given for independent blocks, which have no such choice.
    """
    solver, mode = config.solver.get("init_args", {}), config.parallel.mode
    if mode == "independent" and solver.get("fp_epochs"):
        raise UserError(
            "solver.fp_epochs: independent blocks learn on full-precision inputs in all epochs; leave it out"
        )
    if solver.get("fp_epochs", 0) is None:
        solver.fp_epochs = solver.epochs - 1 if mode == "wavefront" else 0


def make_job(parser: LightningArgumentParser, config: Namespace, signals: Signals, ranks: Ranks = Ranks()) -> Job:  # noqa: B008
    """The job that a parsed configuration of `fit` describes; where several processes run, as one of them has it.

    Two things take effect on the whole process at once, and stay: PyTorch's deterministic algorithms, if
    trainer.deterministic asks for them, and the rank by which Lightning's `rank_zero_only` tells who logs.

    Args:
        parser: Of `fit`.
        config: What it parsed; left as it is.
        signals: What may ask the run to end.
        ranks: The processes of the run.

    Raises:
        UserError: If a class or the Trainer refuses a value.
    """
    if config.trainer.deterministic:  # from the first forward pass on, not only where a Trainer trains
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=config.trainer.deterministic == "warn")
    config = config.clone()
    resolve_fp_epochs(config)
    if Path(config.checkpoint).is_dir():
        config.checkpoint = str(Path(config.checkpoint).absolute())  # for whoever measures the run from elsewhere
    try:
        objects = parser.instantiate(config)
    except ValueError as error:  # a value that its class refuses
        raise UserError(root_message(error)) from error
    values = flatten(config.clone(with_meta=False).as_dict())
    settings = {key: value for key, value in values.items() if not key.startswith(OUTSIDE_FINGERPRINT)}
    if config.parallel.mode == "independent":
        settings["parallel.mode"] = "independent"
    callbacks = objects.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    data, device = objects.data, device_for(config.trainer.accelerator)
    _, members = objects.parallel.arrange(ranks.world, objects.solver.epochs, data.batch_size, data.num_samples)
    if members > 1 and any(isinstance(callback, Timer) for callback in callbacks):
        raise UserError("trainer.callbacks: a Timer would end the training of one process before that of another")
    vars(rank_zero_only)["rank"] = ranks.rank % members  # who logs, of those that train a block together
    logs = None if ranks.rank % members else config.run_dir / "logs"
    make_trainer = trainer_factory(objects.trainer, callbacks, logs, device)
    try:
        make_trainer(0, objects.solver.epochs)  # so that what it refuses shows before any work
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {error}") from error
    return Job(
        checkpoint=config.checkpoint,
        run_dir=config.run_dir,
        precision=objects.precision,
        transform=objects.transform,
        solver=objects.solver,
        data=objects.data,
        prompt=objects.prompt,
        evaluation=objects.evaluation,
        seed=config.seed,
        callbacks=callbacks,
        make_trainer=make_trainer,
        device=device,
        settings=settings,
        config_yaml=parser.dump(config, skip_none=False),
        resume=config.resume,
        compile=config.compile,
        memory=config.memory,
        streams=config.streams,
        signals=signals,
        parallel=objects.parallel,
        ranks=ranks,
        blocks=config.blocks,
    )


def published_job(run_dir: Path, accelerator: str, signals: Signals) -> Job:
    """What a run that has published its model was asked for.

    Raises:
        UserError: If it has not.
    """
    published_model(run_dir)
    return recorded_job(run_dir, signals, accelerator)


def recorded_job(run_dir: Path, signals: Signals, accelerator: str | None = None) -> Job:
    """What a run was asked for, to be done by one process; on another accelerator if one is named.

    Raises:
        UserError: If its configuration can't be read.
    """
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir} holds no run (no {CONFIG})")
    parser = fit_parser()
    check_file(run_dir / CONFIG)
    config = parser.parse_path(run_dir / CONFIG)
    config.run_dir = run_dir
    config.trainer.accelerator = accelerator or config.trainer.accelerator
    config.parallel.stages, config.trainer.devices = None, 1
    check_values(config)
    return make_job(parser, config, signals)
