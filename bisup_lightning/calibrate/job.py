"""One run from checkpoint to artifact: check, walk, assemble, evaluate. Every step finds what an earlier try left."""

import json
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import bisup_lightning
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.run_lock import RunLock
from bisup_lightning.calibrate.run_store import METRICS, Progress, Resume, RunStore
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.calibrate.solvers import Solver
from bisup_lightning.data import corpus
from bisup_lightning.data.corpus import CalibrationData
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.perplexity import Evaluation, evaluate
from bisup_lightning.evaluate.zero_shot import check_tasks, zero_shot
from bisup_lightning.files import sha256
from bisup_lightning.hub.load import load_behind_prompt, load_quantized, open_quantized
from bisup_lightning.hub.save import save_model
from bisup_lightning.model.block import check_scheme
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.checkpoint import resolve
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.quant.spec import Precision, Scheme
from bisup_lightning.transform.invariance import check_invariance
from bisup_lightning.transform.transform import Transform

Compile = Literal["auto", "always", "never"]
WORTH_COMPILING = 5e14  # operations of one forward pass over the text: what a model of 1 B has on 128 × 2048 tokens
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
        signals: What may ask the run to end.
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
    make_trainer: Callable[[int, int], Trainer]
    device: torch.device
    settings: Mapping[str, Any]
    config_yaml: str
    resume: Resume = "auto"
    compile: Compile = "never"
    signals: Signals = field(default_factory=Signals)


def evaluation_dtype(fp: BlockwiseModel) -> torch.dtype:
    """What models compute in when measured and when loaded: the checkpoint's own dtype, or float32 on a CPU."""
    assert fp.storage_dtype is not None
    return torch.float32 if fp.device.type == "cpu" else fp.storage_dtype


def fit(job: Job) -> dict[str, Any]:
    """Quantize a checkpoint, or go on with what an interrupted run left; a finished one returns at once.

    Returns:
        The content of results.json.

    Raises:
        UserError: If something that the user gave can't be used.
        Interrupted: If a signal asked the run to end.
    """
    plain, tokenizer = open_checkpoint(job.checkpoint, job.device)
    prompt_ids = job.prompt.ids(tokenizer, plain.family.config)
    check_vocabulary(torch.tensor(prompt_ids), plain)
    scheme = job.transform.scheme(job.precision)
    check(job, plain, scheme)
    store = RunStore(job.run_dir)
    with RunLock(job.run_dir) as lock:
        progress = store.open(fingerprint(job, plain), job.resume)
        if progress.finished and progress.whole:
            store.clear()  # where the run was killed when it had just finished
            return store.results()

        # Before the work, so that a mistake in a text or a model shows at once.
        sets = evaluation_sets(job.evaluation, job.data.seq_len, job.seed, plain, tokenizer)
        plain.head()
        tokens_NT = progress.tokens_NT
        if tokens_NT is None:
            tokens_NT = calibration_tokens(job, plain.checkpoint.folder, tokenizer)
            check_vocabulary(tokens_NT, plain)
        probe_BT = tokens_NT[:1, :64]
        transformed = transform(job, plain, None if progress.metrics else probe_BT)
        lock.claim()
        store.begin(job.config_yaml, tokens_NT)
        if progress.finished:  # what was lost beside the results is made again, or not needed
            return store.results()
        if len(progress.metrics) < plain.num_layers:
            with torch.compiler.set_stance("default" if compiles(job, plain) else "force_eager"):
                walk(job, transformed, scheme, store, prompt_ids, tokens_NT, progress)
        model = job.run_dir / "model"
        if not progress.published:
            save_model(model, transformed, store.block_digests(), scheme, prompt_ids, plain.dtype, probe_BT)
            store.publish_model()
        quantized = open_quantized(model, job.device)
        perplexity = evaluate(plain, quantized, sets, prompt_ids, job.evaluation.batch_size, tokenizer)
        checkpoint = plain.checkpoint.folder
        scores = score_models(checkpoint, model, tokenizer, prompt_ids, job.evaluation, plain.dtype, job.device)
        sizes = {"checkpoint": size_on_disk(checkpoint), "model": size_on_disk(model)}
        store.finish(results(job, store, perplexity, scores, sizes))
    return store.results()


def transform(job: Job, plain: BlockwiseModel, probe_BT: torch.Tensor | None) -> BlockwiseModel:
    """The full-precision model behind its transform.

    Args:
        job: What was asked for.
        plain: The model as it is.
        probe_BT: A few token ids [B, T] whose logits the transform must leave as they are; None if that is known.

    Raises:
        UserError: If it does not.
    """
    folder, checkpoint = plain.checkpoint.folder, plain.checkpoint
    transformed = job.transform.checkpoint(checkpoint, plain.family, job.device)
    if transformed is not checkpoint and probe_BT is not None:
        exact, rotated = (
            BlockwiseModel(folder, job.device, torch.float32, checkpoint=one) for one in (checkpoint, transformed)
        )
        check_invariance(exact, rotated, probe_BT)
    # On a CPU, the walk computes with the kernels, and so in the last digits, of the model as transformers loads it.
    return BlockwiseModel(folder, job.device, checkpoint=transformed, fused_attention=job.device.type == "cuda")


def walk(
    job: Job,
    model: BlockwiseModel,
    scheme: Scheme,
    store: RunStore,
    prompt_ids: Sequence[int],
    tokens_NT: torch.Tensor,
    progress: Progress,
) -> None:
    """Calibrate the blocks that are left."""
    block_walk = BlockWalk(
        model=model,
        transform=job.transform,
        scheme=scheme,
        solver=job.solver,
        store=store,
        prompt_ids=prompt_ids,
        batch_size=job.data.batch_size,
        seed=job.seed,
        callbacks=job.callbacks,
        make_trainer=job.make_trainer,
        signals=job.signals,
    )
    block_walk.prepare()
    block_walk.resume(tokens_NT, progress)
    block_walk.run()


def compiles(job: Job, plain: BlockwiseModel) -> bool:
    """Whether the walk runs compiled blocks: asked for, or so long that it makes up for a minute of compilation."""
    if job.compile != "auto":
        return job.compile == "always"
    weights = plain.num_layers * sum(shape.numel() for shape in plain.family.layer_shapes(0).values())
    return 2 * weights * job.data.num_samples * job.data.seq_len >= WORTH_COMPILING


def check(job: Job, plain: BlockwiseModel, scheme: Scheme) -> None:
    """Refuse what can be known to fail, before any work.

    Raises:
        UserError: Naming the key and the remedy.
    """
    try:
        check_scheme(plain.family, scheme)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_tokens(job, plain)
    for source in job.evaluation.perplexity:
        corpus.check_source("evaluation.perplexity", source)
    check_tasks(job.evaluation.zero_shot)
    if not any(isinstance(callback, WalkCallback) and callback.saves_blocks for callback in job.callbacks):
        raise UserError(
            "trainer.callbacks: none saves the blocks; add callbacks.checkpoint.BlockCheckpoint as in configs/base.yaml"
        )


def check_tokens(job: Job, fp: BlockwiseModel) -> None:
    """Refuse a text too small for what the transform or the solver learn from it.

    Raises:
        UserError: With the number of tokens needed.
    """
    shapes = fp.family.layer_shapes(0)
    needed = max(shapes[f"{name}.weight"][1] for entry in LINEAR_INPUTS for name in entry.linears)
    tokens = job.data.num_samples * job.data.seq_len
    parts: dict[str, Transform | Solver] = {"transform": job.transform, "solver": job.solver}
    for key, part in parts.items():
        if part.needs_statistics and tokens < needed:
            raise UserError(
                f"{key}: {type(part).__name__} needs at least {needed} calibration tokens, one for each channel; "
                f"data.num_samples × data.seq_len is {tokens}"
            )


def open_checkpoint(checkpoint: str, device: torch.device) -> tuple[BlockwiseModel, PreTrainedTokenizerBase]:
    """A full-precision checkpoint, to be computed block by block as it is measured, and its tokenizer.

    Raises:
        UserError: If it can't be used.
    """
    folder = resolve(checkpoint)
    fp = BlockwiseModel(folder, device)
    fp.dtype = evaluation_dtype(fp)
    try:
        return fp, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the library stumble over
        raise UserError(f"checkpoint: {folder} has no tokenizer that can be read: {error}") from error


def calibration_tokens(job: Job, folder: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N, T] to calibrate on."""
    data = job.data
    if data.calibration == "self":
        return corpus.self_generated(folder, data.num_samples, data.seq_len, job.seed, job.device)
    return corpus.calibration_tokens(data, tokenizer, job.seed)


def evaluation_sets(
    wanted: Evaluation, default_length: int, seed: int, fp: BlockwiseModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Token ids [N, T] of every set to measure on, by name (a file's name without its folder)."""
    length = wanted.seq_len or default_length
    sets = {}
    for source in wanted.perplexity:
        corpus.check_source("evaluation.perplexity", source)
        if source == "self":
            count, folder = wanted.max_chunks or 64, fp.checkpoint.folder
            sets[source] = corpus.self_generated(folder, count, length, seed + corpus.HELD_OUT, fp.device)
        else:
            name = Path(source).name
            name = source if name in sets else name
            sets[name] = corpus.evaluation_tokens(source, tokenizer, length, wanted.max_chunks)
            check_vocabulary(sets[name], fp)
    return sets


def check_vocabulary(ids: torch.Tensor, fp: BlockwiseModel) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        UserError: If the tokenizer belongs to another vocabulary.
    """
    if ids.numel() and int(ids.max()) >= fp.family.vocab_size:
        raise UserError(
            f"checkpoint: the tokenizer in {fp.checkpoint.folder} gives token {int(ids.max())}, but the model knows "
            f"{fp.family.vocab_size}; they belong to different models"
        )


def fingerprint(job: Job, fp: BlockwiseModel) -> dict[str, Any]:
    """All that the result depends on: settings, model files, text files, code version, device type."""
    entries = dict(job.settings)
    folder = fp.checkpoint.folder
    tokenizer = (path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)))
    for path in [folder / "config.json", *tokenizer, *fp.checkpoint.shards]:
        entries[f"checkpoint/{path.name}"] = sha256(path)
    for source in {job.data.calibration, *job.evaluation.perplexity, *job.evaluation.zero_shot}:
        if Path(source).is_file():
            entries[f"text/{source}"] = sha256(Path(source))
    return entries | {"bisup_lightning": bisup_lightning.__version__, "device": job.device.type}


def size_on_disk(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def results(
    job: Job, store: RunStore, perplexity: Mapping[str, Any], zero_shot: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The content of results.json."""
    blocks = [json.loads(path.with_name(METRICS).read_text(encoding="utf-8")) for path in store.block_digests()]
    seconds = sum(block["seconds"] for block in blocks)
    tokens = job.data.num_samples * job.data.seq_len * len(blocks)
    on_gpu = job.device.type == "cuda"
    return {
        "checkpoint": job.checkpoint,
        "perplexity": perplexity,
        "zero_shot": zero_shot,
        "bytes": dict(sizes),
        "blocks": blocks,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_device_bytes": torch.cuda.max_memory_allocated(job.device) if on_gpu else 0,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(job.device) if on_gpu else platform.processor() or platform.machine(),
        "versions": {
            "bisup_lightning": bisup_lightning.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "fingerprint": store.fingerprint,
    }


def read_results(run_dir: Path) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        UserError: If there are none, or the run is damaged.
    """
    store = RunStore(run_dir)
    store.check_finished()
    return store.results()


def evaluate_run(job: Job) -> dict[str, Any]:
    """Measure a finished run's model again, as `fit` did: `perplexity` and `zero_shot` of results.json."""
    check_tasks(job.evaluation.zero_shot)
    fp, tokenizer = open_checkpoint(job.checkpoint, job.device)
    sets = evaluation_sets(job.evaluation, job.data.seq_len, job.seed, fp, tokenizer)
    model, prompt = job.run_dir / "model", job.prompt.ids(tokenizer, fp.family.config)
    quantized = open_quantized(model, job.device)
    folder = fp.checkpoint.folder
    return {
        "perplexity": evaluate(fp, quantized, sets, prompt, job.evaluation.batch_size, tokenizer),
        "zero_shot": score_models(folder, model, tokenizer, prompt, job.evaluation, fp.dtype, job.device),
    }


def evaluate_checkpoint(
    checkpoint: str, evaluation: Evaluation, prompt: Prompt, seed: int, device: torch.device
) -> dict[str, Any]:
    """Measure a full-precision checkpoint, plain and behind a prompt: `perplexity` and `zero_shot`.

    Raises:
        UserError: If it can't be used, or there is nothing to measure.
    """
    fp, tokenizer = open_checkpoint(checkpoint, device)
    if not evaluation.perplexity and not evaluation.zero_shot:
        raise UserError("evaluation.perplexity: name at least one set, such as '[wikitext2]', or evaluation.zero_shot")
    check_tasks(evaluation.zero_shot)
    sets = evaluation_sets(evaluation, 2048, seed, fp, tokenizer)
    ids = prompt.ids(tokenizer, fp.family.config)
    return {
        "perplexity": evaluate(fp, None, sets, ids, evaluation.batch_size, tokenizer),
        "zero_shot": score_models(fp.checkpoint.folder, None, tokenizer, ids, evaluation, fp.dtype, device),
    }


def score_models(
    folder: Path,
    quantized: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    evaluation: Evaluation,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Zero-shot scores by task: `metric`, `documents`, and `value` and `stderr` of each model, loaded one by one.

    Args:
        folder: The full-precision checkpoint: `fp`, and `fp_prompt` behind the prompt.
        quantized: A run's `model/`, which has its own prompt: `quantized`.
        tokenizer: Of all of them.
        prompt: Token ids of the prompt.
        evaluation: Names the tasks.
        dtype: What the full-precision model computes in.
        device: Where.
    """
    if not evaluation.zero_shot:
        return {}
    load: dict[str, Callable[[], PreTrainedModel]] = {
        "fp": lambda: load_behind_prompt(folder, (), dtype, device),
        "fp_prompt": lambda: load_behind_prompt(folder, prompt, dtype, device),
    }
    if quantized is not None:
        load["quantized"] = lambda: load_quantized(quantized, device)
    scores: dict[str, dict[str, Any]] = {}
    for key, load_model in load.items():
        found = zero_shot(
            load_model(), tokenizer, evaluation.zero_shot, evaluation.zero_shot_limit, evaluation.batch_size
        )
        for task, score in found.items():
            row = scores.setdefault(task, {"metric": score.metric, "documents": score.documents})
            row[key] = {"value": score.value, "stderr": score.stderr}
    return scores
