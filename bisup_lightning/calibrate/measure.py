"""What a model is worth: perplexity and zero-shot scores of checkpoints and finished runs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bisup_lightning.calibrate.job import Job, checkpoint_digests
from bisup_lightning.calibrate.run_reader import RunReader
from bisup_lightning.data import corpus
from bisup_lightning.data.prompt import Prompt
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.perplexity import evaluate
from bisup_lightning.evaluate.settings import Evaluation
from bisup_lightning.evaluate.zero_shot import check_zero_shot, devices_for, fetch_tasks, zero_shot
from bisup_lightning.hub.load import load_behind_prompt, load_quantized, open_quantized
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.checkpoint import resolve
from bisup_lightning.run_layout import MODEL


def evaluation_dtype(fp: BlockwiseModel) -> torch.dtype:
    """What models compute in when measured and when loaded: the checkpoint's own dtype, or float32 on a CPU."""
    return torch.float32 if fp.device.type == "cpu" else fp.storage_dtype


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


def fetch_sets(
    wanted: Evaluation, default_length: int, seed: int, fp: BlockwiseModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Get all that `measure` needs: the documents of zero-shot tasks into the cache, and the sets of `evaluation_sets`.

    Raises:
        UserError: If something can't be had, or is too short.
    """
    fetch_tasks(wanted.zero_shot)
    return evaluation_sets(wanted, default_length, seed, fp, tokenizer)


def evaluation_sets(
    wanted: Evaluation, default_length: int, seed: int, fp: BlockwiseModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Token ids [N, T] of every set to measure on, by name (a file's name without its folder)."""
    length = wanted.seq_len or default_length
    sets = {}
    for source in wanted.perplexity:
        corpus.check_source("evaluation.perplexity", source)
        fp.family.check_length("evaluation.seq_len", length)
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


def read_results(run_dir: Path) -> dict[str, Any]:
    """The results of a finished run.

    Raises:
        UserError: If there are none, or the run is damaged.
    """
    run = RunReader(run_dir)
    run.open_finished()
    run.check_whole()
    return run.results()


def published_model(run_dir: Path) -> Path:
    """The model of a run that has published it, measured or not.

    Raises:
        UserError: If there is none, or the run is damaged.
    """
    run = RunReader(run_dir)
    run.open_published()
    run.check_whole()
    return run_dir / MODEL


def open_original(job: Job) -> tuple[BlockwiseModel, PreTrainedTokenizerBase]:
    """As `open_checkpoint`, of what a run was made of.

    Raises:
        UserError: If that is another by now.
    """
    fp, tokenizer = open_checkpoint(job.checkpoint, job.device)
    run = RunReader(job.run_dir)
    run.open_published()
    for name, digest in checkpoint_digests(fp).items():
        if run.fingerprint.get(name) != digest:
            path = fp.checkpoint.folder / Path(name).name
            raise UserError(f"checkpoint: {path} is not what {job.run_dir} was made of; put that back, or run fit anew")
    return fp, tokenizer


def prompt_of(job: Job, tokenizer: PreTrainedTokenizerBase, fp: BlockwiseModel) -> list[int]:
    """Token ids of the prompt that a job's run began with; those that the job gives if that is not known."""
    known = RunReader(job.run_dir).read_prompt()
    return job.prompt.ids(tokenizer, fp.family.config) if known is None else known


def evaluate_run(job: Job) -> dict[str, Any]:
    """Measure a run's model again, as `fit` did: `perplexity` and `zero_shot` of results.json.

    Raises:
        UserError: If its checkpoint is another by now, or something can't be measured.
    """
    check_zero_shot(job.evaluation, job.device)  # before the checkpoint is hashed
    fp, tokenizer = open_original(job)
    sets = fetch_sets(job.evaluation, job.data.seq_len, job.seed, fp, tokenizer)
    return measure(fp, job.run_dir / MODEL, tokenizer, prompt_of(job, tokenizer, fp), job.evaluation, sets)


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
    check_zero_shot(evaluation, device)
    sets = fetch_sets(evaluation, 2048, seed, fp, tokenizer)
    return measure(fp, None, tokenizer, prompt.ids(tokenizer, fp.family.config), evaluation, sets)


def measure(
    fp: BlockwiseModel,
    quantized: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    evaluation: Evaluation,
    sets: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Measure a full-precision model and what a run made of it: `perplexity` and `zero_shot` of results.json.

    Args:
        fp: The full-precision model, measured plain and behind the prompt.
        quantized: A run's `model/`, which has its own prompt; None for none.
        tokenizer: Of both.
        prompt_ids: Token ids of the prompt.
        evaluation: What is measured.
        sets: Its sets, from `fetch_sets`.
    """
    model = None if quantized is None else open_quantized(quantized, fp.device)
    folder = fp.checkpoint.folder
    return {
        "perplexity": evaluate(fp, model, sets, prompt_ids, evaluation.batch_size, tokenizer),
        "zero_shot": score_models(folder, quantized, tokenizer, prompt_ids, evaluation, fp.dtype, fp.device),
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
    load: dict[str, Callable[[torch.device], PreTrainedModel]] = {
        "fp": partial(load_behind_prompt, folder, (), dtype),
        "fp_prompt": partial(load_behind_prompt, folder, tuple(prompt), dtype),
    }
    if quantized is not None:
        load["quantized"] = partial(load_quantized, quantized)
    devices = devices_for(evaluation.devices, device)
    scores: dict[str, dict[str, Any]] = {}
    for key, load_model in load.items():
        found = zero_shot(
            load_model, tokenizer, evaluation.zero_shot, evaluation.zero_shot_limit, evaluation.batch_size, devices
        )
        for task, score in found.items():
            row = scores.setdefault(task, {"metric": score.metric, "documents": score.documents})
            row[key] = {"value": score.value, "stderr": score.stderr}
    return scores
