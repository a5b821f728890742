"""Traces a finished run's errors on its calibration and evaluation text (paper §5.4)."""

from typing import Any

from torch import Tensor

from bisup_lightning.calibrate.job import Job
from bisup_lightning.calibrate.measure import evaluation_sets, open_original, prompt_of
from bisup_lightning.calibrate.run_reader import RunReader
from bisup_lightning.evaluate.errors import attention_maps, hidden_errors
from bisup_lightning.files import write_json
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.run_layout import ANALYSIS, MODEL

MAP_TOKENS = 32  # side of an attention map


def analyze_run(job: Job, chunks: int) -> dict[str, Any]:
    """Write `analysis.json` into the run's folder, and return its content.

    For each text: `mse` and `relative_mse` behind every block, and `by_position`, the relative error behind the last
    block at each token, with the prompt exact and quantized. Attention maps of the first, a middle and the last block.

    Args:
        job: A run that has published its model.
        chunks: Most sequences of each text.

    Raises:
        UserError: If its checkpoint is another by now.
    """
    plain, tokenizer = open_original(job)  # untransformed; `fp` is the same model in the basis of the quantized one
    folder = plain.checkpoint.folder
    transformed = job.transform.checkpoint(plain.checkpoint, plain.family, job.device)
    fp = BlockwiseModel(folder, job.device, plain.dtype, checkpoint=transformed)
    quantized = open_quantized(job.run_dir / MODEL, job.device)
    prompt = prompt_of(job, tokenizer, plain)
    sets = {"calibration": RunReader(job.run_dir).read_tokens()}
    sets |= evaluation_sets(job.evaluation, job.data.seq_len, job.seed, plain, tokenizer)
    sets = {name: ids_NT[:chunks] for name, ids_NT in sets.items()}
    name, ids_NT = list(sets.items())[-1]
    shown = sorted({0, plain.num_layers // 2, plain.num_layers - 1})
    maps = {
        key: [_rounded(map_TK) for map_TK in attention_maps(model, ids_NT[:, :MAP_TOKENS], prompt, shown)]
        for key, model in {"fp": fp, "quantized": quantized}.items()
    }
    analysis = {
        "sets": {name: _errors(job, fp, quantized, ids_NT, prompt) for name, ids_NT in sets.items()},
        "attention": {"set": name, "blocks": shown, **maps},
    }
    write_json(job.run_dir / ANALYSIS, analysis)
    return analysis


def _errors(
    job: Job, fp: BlockwiseModel, quantized: BlockwiseModel, ids_NT: Tensor, prompt: list[int]
) -> dict[str, Any]:
    as_run = hidden_errors(fp, quantized, ids_NT, prompt, job.evaluation.batch_size)
    by_position = {"prompt_exact" if prompt else "no_prompt": as_run.by_position().tolist()}
    if prompt:
        like_text = hidden_errors(fp, quantized, ids_NT, prompt, job.evaluation.batch_size, prompt_exact=False)
        by_position["prompt_quantized"] = like_text.by_position().tolist()
    return {"mse": as_run.mse().tolist(), "relative_mse": as_run.relative_mse().tolist(), "by_position": by_position}


def _rounded(map_TK: Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in map_TK.tolist()]
