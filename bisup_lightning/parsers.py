"""The keys of the command line: one parser for `fit`, and one for all subcommands."""

from functools import cache
from pathlib import Path

from jsonargparse import lazy_instance
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from bisup_lightning.calibrate.driver import Memory
from bisup_lightning.calibrate.job import Compile
from bisup_lightning.calibrate.parallel import Parallel
from bisup_lightning.calibrate.run_reader import Resume
from bisup_lightning.calibrate.solvers import Solver
from bisup_lightning.configuration import TRUST, new_parser
from bisup_lightning.data.corpus import CalibrationData
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.data.streams import Streams
from bisup_lightning.evaluate.settings import Evaluation
from bisup_lightning.quant.spec import Precision
from bisup_lightning.transform import reorder, rotate  # noqa: F401  whose classes are then known by their names alone
from bisup_lightning.transform.transform import NoTransform, Transform

# What remains of Lightning's Trainer once the walk has decided the rest.
TRAINER_SETTINGS = {
    "accelerator", "devices", "logger", "callbacks", "gradient_clip_val", "deterministic", "detect_anomaly", "profiler",
}  # fmt: skip


@cache
def fit_parser() -> LightningArgumentParser:
    """The keys of `fit`; a third of a second's work, and wanted twice."""
    parser = new_parser("Quantize a checkpoint: walk its blocks, write run_dir/model, measure it.")
    parser.add_argument("--checkpoint", type=str, required=True, help="Folder or hub id of the model to quantize.")
    parser.add_argument(
        "--run_dir", type=Path, required=True, help="Directory of all output; the same command resumes."
    )
    parser.add_argument(
        "--resume",
        type=Resume,
        default="auto",
        help="auto: go on with what run_dir holds, or begin; never: run_dir must be new; must: it must hold a run.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Measure one block on a few sequences, print the time, memory and disk that the run would take, and end.",
    )
    parser.add_argument(
        "--compile",
        type=Compile,
        default="auto",
        help="Compile the blocks on a GPU, which takes half a minute: auto: if the model is so large that it pays, and "
        "no deterministic algorithms are asked for; always; never.",
    )
    parser.add_argument(
        "--memory",
        type=Memory,
        default="auto",
        help="auto: as fast as the device's memory allows; low: one sequence at a time, activations computed anew for "
        "the gradients, streams off the device.",
    )
    parser.add_argument(
        "--streams",
        type=Streams,
        default="auto",
        help="Where the hidden states of the calibration text live: device; host; file, mapped, in run_dir; auto: the "
        "first of these that has room.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all that is drawn.")
    parser.add_class_arguments(Parallel, "parallel", help="How several devices work at one model (trainer.devices).")
    parser.add_argument(
        "--blocks",
        type=str | None,
        default=None,
        help="first:end of the blocks to calibrate, for a job of many whose runs `merge` assembles.",
    )
    parser.add_class_arguments(Precision, "precision", help="What is quantized, and how finely.")
    untransformed = lazy_instance(NoTransform)
    parser.add_subclass_arguments(Transform, "transform", default=untransformed, help="What the model undergoes first.")
    parser.add_subclass_arguments(Solver, "solver", help="How each block is solved.")
    parser.add_class_arguments(CalibrationData, "data", help="Text to calibrate on.")
    parser.add_class_arguments(Prompt, "prompt", help="The prompt that stays at high precision.")
    parser.add_class_arguments(Evaluation, "evaluation", help="What is measured at the end.")
    skipped = set(Trainer.__init__.__annotations__) - TRAINER_SETTINGS - {"return"}
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=skipped, help="Lightning's Trainer.")
    return parser


@cache
def build_parser() -> LightningArgumentParser:
    """All subcommands."""
    parser = new_parser("Bring a Llama- or Qwen-family checkpoint to 3- or 4-bit weights, activations and KV cache.")
    test = new_parser("Measure a run again, or any checkpoint.")
    test.add_argument("--run_dir", type=Path | None, default=None, help="A run that has published its model.")
    test.add_argument("--checkpoint", type=str | None, default=None, help="Or a checkpoint: folder or hub id.")
    test.add_class_arguments(Prompt, "prompt", help="Prompt for a checkpoint; a run has its own.")
    test.add_class_arguments(
        Evaluation, "evaluation", help="What is not given is the run's own; given sets or tasks replace all of its own."
    )
    test.add_argument("--output", type=Path | None, default=None, help="JSON file for the figures, in all digits.")
    test.add_argument("--seed", type=int, default=0, help="Seed of self-generated text for a checkpoint.")
    test.add_argument("--accelerator", type=str, default="auto", help="cpu, cuda or auto.")
    predict = new_parser("Complete a text with a quantized model, behind its exact prompt.")
    predict.add_argument("--run_dir", type=Path, required=True, help="A run that has published its model.")
    predict.add_argument("--text", type=str, required=True, help="What to complete.")
    predict.add_argument("--max_new_tokens", type=int, default=64, help="Most tokens to add.")
    predict.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time.")
    predict.add_argument("--accelerator", type=str, default="auto", help="cpu, cuda or auto.")
    analyze = new_parser("Trace a finished run's errors down the blocks and along the text, for its report.")
    analyze.add_argument("--run_dir", type=Path, required=True, help="A finished run.")
    analyze.add_argument("--chunks", type=int, default=8, help="Most sequences of each text.")
    analyze.add_argument("--accelerator", type=str, default="auto", help="cpu, cuda or auto.")
    report = new_parser("Write a finished run's report.html again.")
    report.add_argument("--run_dir", type=Path, required=True, help="A finished run.")
    compare = new_parser("Print finished runs side by side, and in the layout of the paper's tables.")
    compare.add_argument("runs", type=Path, nargs="+", help="Run directories; the first is the baseline.")
    compare.add_argument("--output", type=Path | None, default=None, help="Where tables and the chart of errors go.")
    merge_runs = new_parser("Assemble runs of `fit --parallel.mode independent --blocks first:end`.")
    merge_runs.add_argument("runs", type=Path, nargs="+", help="Their directories.")
    merge_runs.add_argument("--run_dir", type=Path, required=True, help="Directory of the whole run.")
    parser.add_argument(
        TRUST, action="append", metavar="MODULE", help="Module whose classes a configuration may name; see README."
    )
    commands = parser.add_subcommands(required=True)
    for name, sub, line in (  # main.py repeats these lines, to show them at once
        ("fit", fit_parser(), "quantize a checkpoint"),
        ("test", test, "measure a run or a checkpoint"),
        ("predict", predict, "complete a text with a quantized model"),
        ("compare", compare, "print runs side by side"),
        ("analyze", analyze, "trace a run's errors"),
        ("report", report, "write a run's report again"),
        ("merge", merge_runs, "assemble runs of some blocks each"),
    ):
        commands.add_subcommand(name, sub, help=line)
    return parser
