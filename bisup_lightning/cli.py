"""The command line: builds what configurations describe, and starts it. Nothing below it knows of configurations."""

import copy
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from bisup_lightning.calibrate.analysis import analyze_run
from bisup_lightning.calibrate.block_trainer import BlockTrainer
from bisup_lightning.calibrate.budget import check_folder
from bisup_lightning.calibrate.checkpoint_io import WholeFileIO
from bisup_lightning.calibrate.dry_run import dry_run
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.fit import fit
from bisup_lightning.calibrate.job import Job
from bisup_lightning.calibrate.launch import launch
from bisup_lightning.calibrate.measure import evaluate_checkpoint, evaluate_run, published_model, read_results
from bisup_lightning.calibrate.merge import merge
from bisup_lightning.calibrate.parallel import Ranks, environment, join
from bisup_lightning.calibrate.signals import Interrupted, Signals, requeue
from bisup_lightning.configuration import check_file, flatten, one_line, root_message, trust
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.data.share import PeerLost
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.perplexity import Evaluation
from bisup_lightning.files import write_json
from bisup_lightning.hub.audit import AuditError
from bisup_lightning.hub.generate import complete
from bisup_lightning.parsers import build_parser, fit_parser
from bisup_lightning.quant.spec import QuantSpec
from bisup_lightning.report.compare import tables_of, write_tables
from bisup_lightning.report.errors_chart import write_errors
from bisup_lightning.report.page import REPORT, write_report
from bisup_lightning.report.run import Run
from bisup_lightning.report.tables import comparison_table, perplexity_table, text_table, zero_shot_table
from bisup_lightning.run_layout import CONFIG

PEER_LOST_PAUSE = 5.0  # seconds in which the launcher finds out which process ended first
HARMLESS = (
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
) -> Callable[[int, int], Trainer]:
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
    """Refuse values whose classes can't name their key.

    Raises:
        UserError: Naming the key.
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
    processes(config)
    if (clip := config.trainer.gradient_clip_val) is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val must be 0 or more, not {clip}")


def processes(config: Namespace) -> int:
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


def settle_inputs(config: Namespace) -> None:
    """Say in the configuration, and so in the run's fingerprint, how many epochs are on full-precision inputs."""
    solver, mode = config.solver.get("init_args", {}), config.parallel.mode
    if mode == "independent" and solver.get("fp_epochs"):
        raise UserError(
            "solver.fp_epochs: independent blocks learn on full-precision inputs in all epochs; leave it out"
        )
    if solver.get("fp_epochs", 0) is None:
        solver.fp_epochs = solver.epochs - 1 if mode == "wavefront" else 0


def make_job(parser: LightningArgumentParser, config: Namespace, signals: Signals, ranks: Ranks = Ranks()) -> Job:  # noqa: B008
    """What `fit` was asked for, from its parsed configuration; where several processes run, as one of them."""
    if config.trainer.deterministic:  # from the first forward pass on, not only where a Trainer trains
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=config.trainer.deterministic == "warn")
    settle_inputs(config)
    if Path(config.checkpoint).is_dir():
        config.checkpoint = str(Path(config.checkpoint).absolute())  # for whoever measures the run from elsewhere
    try:
        objects = parser.instantiate(config)
    except ValueError as error:  # a value that its class refuses
        raise UserError(root_message(error)) from error
    plain = config.clone(with_meta=False).as_dict()
    plain.pop("config", None)
    settings = {key: value for key, value in flatten(plain).items() if not key.startswith(HARMLESS)}
    if config.parallel.mode == "independent":
        settings["parallel.mode"] = "independent"
    callbacks = objects.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    data, device = objects.data, device_for(config.trainer.accelerator)
    _, members = objects.parallel.arrange(ranks.world, objects.solver.epochs, data.batch_size, data.num_samples)
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


def run(arguments: Sequence[str], signals: Signals) -> int:
    """Parse and do.

    Returns:
        The exit code.

    Raises:
        UserError: If something that the user gave can't be used.
        Interrupted: If a signal asked to end.
    """
    parser = build_parser()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    trusting = trust(arguments)
    config = parser.parse_args(trusting)
    command, options = config.subcommand, config[config.subcommand]
    if command == "fit":
        check_values(options)
        place, ranks = environment(), Ranks()
        if place is not None:
            if torch.cuda.is_available():
                torch.cuda.set_device(place.local_rank())
            ranks = join(place, device_for(options.trainer.accelerator))
        elif not options.dry_run and (count := processes(options)) > 1:
            make_job(fit_parser(), options, signals, Ranks(world=count))  # so that a mistake shows once, and at once
            return launch(arguments, count)
        job = make_job(fit_parser(), options, signals, ranks)
        if options.dry_run:
            console.print(text_table("Dry run", ("", "expected", "free"), dry_run(job).rows()))
            return 0
        results = fit(job)
        if results is not None:
            print_run(console, options.run_dir, results)
        elif ranks.leads:
            console.print(f"blocks {options.blocks}: {options.run_dir}, for `main.py merge`")
    elif command == "merge":
        job = replace(recorded_job(options.runs[0], signals), run_dir=options.run_dir)
        print_run(console, options.run_dir, merge(options.runs, job))
    elif command == "test":
        scores = test(options, parser.parse_args(trusting, defaults=False)[command], signals)
        print_scores(console, scores)
        if options.output is not None:
            write_json(options.output, scores)
    elif command == "predict":
        device = device_for(options.accelerator)
        if options.max_new_tokens < 1 or options.temperature < 0:
            raise UserError("predict: max_new_tokens must be at least 1, and temperature 0 or more")
        folder = published_model(options.run_dir)
        console.print(complete(folder, options.text, options.max_new_tokens, options.temperature, device), markup=False)
    elif command == "analyze":
        if options.chunks < 1:
            raise UserError(f"analyze: chunks must be at least 1, not {options.chunks}")
        read_results(options.run_dir)  # which the report shows beside the errors
        analyze_run(recorded_job(options.run_dir, signals, options.accelerator), options.chunks)
        console.print(f"report: {write_report(options.run_dir)}")
    elif command == "report":
        console.print(f"report: {write_report(options.run_dir)}")
    else:
        if options.output is not None:
            check_folder("output", options.output)
        runs = {str(path): Run.read(path) for path in options.runs}
        tables = tables_of(list(runs.values()))
        console.print(comparison_table({name: run.results for name, run in runs.items()}))
        for table in tables:
            console.print(text_table(table.title, table.header, table.rows))
        if options.output is not None:
            write_tables(options.output, tables)
            console.print(f"tables: {options.output}/compare.md, .csv, .tex")
            chart = write_errors(options.output, list(runs.values()))
            console.print(
                f"errors: {chart or 'no chart, as no run is analyzed; run main.py analyze --run_dir RUN first'}"
            )
    return 0


def print_run(console: Console, run_dir: Path, results: Mapping[str, Any] | None) -> None:
    """Print what a run measured and where it lies, and write its report unless that is there."""
    assert results is not None
    print_scores(console, results)
    console.print(f"model: {run_dir / 'model'}")
    if not (run_dir / REPORT).is_file():
        write_report(run_dir)
    console.print(f"report: {run_dir / REPORT}")


def print_scores(console: Console, results: Mapping[str, Any]) -> None:
    """Print what was measured."""
    if results["perplexity"] or not results["zero_shot"]:
        console.print(perplexity_table(results))
    if results["zero_shot"]:
        console.print(zero_shot_table(results))


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


def test(options: Namespace, given: Namespace, signals: Signals) -> dict[str, Any]:
    """Perplexity and zero-shot figures of a run or a checkpoint.

    Args:
        options: All of them.
        given: Those that the user gave; the others are a run's own.
        signals: What may ask to end.

    Raises:
        UserError: If something that the user gave can't be used.
    """
    if (options.run_dir is None) == (options.checkpoint is None):
        raise UserError("test: give either --run_dir or --checkpoint")
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"output: there is no folder {options.output.parent}")
    try:
        evaluation, prompt = Evaluation(**vars(options.evaluation)), Prompt(**vars(options.prompt))
    except ValueError as error:
        raise UserError(str(error)) from error
    if options.checkpoint is not None:
        return evaluate_checkpoint(
            options.checkpoint, evaluation, prompt, options.seed, device_for(options.accelerator)
        )
    for key in ("prompt", "seed"):
        if key in given:
            raise UserError(f"test: {key} is a run's own; leave it out, or measure with --checkpoint")
    job = published_job(options.run_dir, options.accelerator, signals)
    chosen = vars(given.get("evaluation", Namespace()))
    if chosen.keys() & {"perplexity", "zero_shot"}:  # in place of all that the run measured
        chosen = {"perplexity": (), "zero_shot": ()} | chosen
    return evaluate_run(replace(job, evaluation=replace(job.evaluation, **chosen)))


def quieten() -> None:
    """Keep libraries from talking over the progress line; their errors, and this package's warnings, still show."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("lightning.pytorch", "transformers", "huggingface_hub", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_float32_matmul_precision("highest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 2 for a user's mistake and 1 for a model that fails its audit, each behind one line on stderr;
        128 + the signal's number where one ended the run.
    """
    quieten()
    with Signals() as signals:
        try:
            return run(sys.argv[1:] if arguments is None else arguments, signals)
        except PeerLost as error:
            with suppress(Interrupted):
                time.sleep(PEER_LOST_PAUSE)
            print(f"error: another process of the run is gone ({error})", file=sys.stderr)
            return 1
        except Interrupted as interruption:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            if interruption.signum == signal.SIGUSR1:
                requeue()
            return interruption.exit_code
        except AuditError as error:
            print(f"error: {one_line(error)}; nothing was published", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError as error:  # where halving the batch is no help: outside of calibration
            print(f"error: {one_line(error)} Give a smaller evaluation.batch_size", file=sys.stderr)
            return 2
        except (UserError, ArgumentError, OSError) as error:
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            print(f"error: {f'rank {rank}: ' * (rank != '0')}{one_line(error)}", file=sys.stderr)
            return 2
