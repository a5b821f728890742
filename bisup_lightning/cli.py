"""The command line: what each command does, and how a mistake or an interruption is answered."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from bisup_lightning.calibrate.analysis import analyze_run
from bisup_lightning.calibrate.budget import check_folder
from bisup_lightning.calibrate.dry_run import dry_run
from bisup_lightning.calibrate.fit import fit
from bisup_lightning.calibrate.launch import launch
from bisup_lightning.calibrate.measure import evaluate_checkpoint, evaluate_run, published_model, read_results
from bisup_lightning.calibrate.merge import merge
from bisup_lightning.calibrate.parallel import Ranks, environment, join, own_device
from bisup_lightning.calibrate.signals import Interrupted, Signals, requeue
from bisup_lightning.configuration import one_line, trust
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.data.share import PeerLost
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.settings import Evaluation
from bisup_lightning.files import write_json
from bisup_lightning.hub.audit import AuditError
from bisup_lightning.hub.generate import complete
from bisup_lightning.job_config import check_values, device_for, make_job, process_count, published_job, recorded_job
from bisup_lightning.parsers import build_parser, fit_parser
from bisup_lightning.report.compare import tables_of, write_tables
from bisup_lightning.report.errors_chart import write_errors
from bisup_lightning.report.page import REPORT, write_report
from bisup_lightning.report.run import Run
from bisup_lightning.report.tables import comparison_table, perplexity_table, text_table, zero_shot_table

PEER_LOST_PAUSE = 5.0  # seconds in which the launcher finds out which process ended first


@dataclass(frozen=True)
class Call:
    """One call of the command line.

    Args:
        parser: Of all commands.
        arguments: As they were given.
        options: Those of the command, parsed.
        signals: What may ask to end.
        console: Where its answer is printed.
    """

    parser: LightningArgumentParser
    arguments: Sequence[str]
    options: Namespace
    signals: Signals
    console: Console


def run(arguments: Sequence[str], signals: Signals) -> int:
    """Parse and do.

    Returns:
        The exit code.

    Raises:
        UserError: If something that the user gave can't be used.
        Interrupted: If a signal asked to end.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    parser = build_parser()
    config = parser.parse_args(trust(arguments))
    return COMMANDS[config.subcommand](Call(parser, arguments, config[config.subcommand], signals, console))


def run_fit(call: Call) -> int:
    """Quantize a checkpoint, or tell what that takes: as the only process, the launcher, or one that it started."""
    options = call.options
    check_values(options)
    place, ranks = environment(), Ranks()
    if place is not None:
        device = device_for(options.trainer.accelerator)
        if device.type == "cuda":
            torch.cuda.set_device(own_device(place.local_rank(), torch.cuda.device_count()))
        ranks = join(place, device)
    elif not options.dry_run and (count := process_count(options)) > 1:
        make_job(fit_parser(), options, call.signals, Ranks(world=count))  # so that a mistake shows once, and at once
        return launch(call.arguments, count)
    job = make_job(fit_parser(), options, call.signals, ranks)
    if options.dry_run:
        call.console.print(text_table("Dry run", ("", "expected", "free"), dry_run(job).rows()))
        return 0
    results = fit(job)
    if results is not None:
        print_run(call.console, options.run_dir, results)
    elif ranks.leads:
        call.console.print(f"blocks {options.blocks}: {options.run_dir}, for `main.py merge`")
    return 0


def run_merge(call: Call) -> int:
    """Assemble runs of some blocks each."""
    options = call.options
    job = replace(recorded_job(options.runs[0], call.signals), run_dir=options.run_dir)
    print_run(call.console, options.run_dir, merge(options.runs, job))
    return 0


def run_test(call: Call) -> int:
    """Measure a run or a checkpoint."""
    given = call.parser.parse_args(trust(call.arguments), defaults=False).test
    scores = measure(call.options, given, call.signals)
    print_scores(call.console, scores)
    if call.options.output is not None:
        write_json(call.options.output, scores)
    return 0


def run_predict(call: Call) -> int:
    """Complete a text with a quantized model."""
    options = call.options
    device = device_for(options.accelerator)
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise UserError("predict: max_new_tokens must be at least 1, and temperature 0 or more")
    folder = published_model(options.run_dir)
    completed = complete(folder, options.text, options.max_new_tokens, options.temperature, device)
    call.console.print(completed, markup=False)
    return 0


def run_analyze(call: Call) -> int:
    """Trace a run's errors, and show them in its report."""
    options = call.options
    if options.chunks < 1:
        raise UserError(f"analyze: chunks must be at least 1, not {options.chunks}")
    read_results(options.run_dir)  # which the report shows beside the errors
    analyze_run(recorded_job(options.run_dir, call.signals, options.accelerator), options.chunks)
    return run_report(call)


def run_report(call: Call) -> int:
    """Write a run's report again."""
    call.console.print(f"report: {write_report(call.options.run_dir)}")
    return 0


def run_compare(call: Call) -> int:
    """Print runs side by side, and write their tables and the chart of their errors."""
    console, output = call.console, call.options.output
    if output is not None:
        check_folder("output", output)
    runs = {str(path): Run.read(path) for path in call.options.runs}
    tables = tables_of(list(runs.values()))
    console.print(comparison_table({name: run.results for name, run in runs.items()}))
    for table in tables:
        console.print(text_table(table.title, table.header, table.rows))
    if output is not None:
        write_tables(output, tables)
        console.print(f"tables: {output}/compare.md, .csv, .tex")
        chart = write_errors(output, list(runs.values()))
        console.print(f"errors: {chart or 'no chart, as no run is analyzed; run main.py analyze --run_dir RUN first'}")
    return 0


COMMANDS: dict[str, Callable[[Call], int]] = {  # each returns the exit code; their keys are in parsers.py
    "fit": run_fit,
    "test": run_test,
    "predict": run_predict,
    "compare": run_compare,
    "analyze": run_analyze,
    "report": run_report,
    "merge": run_merge,
}


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


def measure(options: Namespace, given: Namespace, signals: Signals) -> dict[str, Any]:
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
