"""One run from checkpoint to artifact: check, walk, assemble, evaluate. Every step finds what an earlier try left."""

import json
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from transformers import PreTrainedTokenizerBase

import bisup_lightning
from bisup_lightning.calibrate.budget import Budget, check_room
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.job import Job, check, compiles, fingerprint
from bisup_lightning.calibrate.measure import check_vocabulary, evaluation_sets, open_checkpoint, score_models
from bisup_lightning.calibrate.parallel import (
    leave,
    parse_blocks,
    take_place,
)
from bisup_lightning.calibrate.run_lock import RunLock
from bisup_lightning.calibrate.run_reader import Progress
from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.calibrate.wavefront import Independent, Wavefront
from bisup_lightning.data import corpus
from bisup_lightning.data.share import PeerLost
from bisup_lightning.evaluate.perplexity import evaluate
from bisup_lightning.evaluate.zero_shot import fetch_tasks
from bisup_lightning.hub.card import model_card
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.hub.save import save_model
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.quant.spec import Scheme
from bisup_lightning.run_layout import METRICS
from bisup_lightning.transform.invariance import check_invariance

BEGUN, WALKED, ENDED = "begun", "walked", "ended"  # what the processes of a run tell each other
PARTING = 25.0  # seconds that a signal leaves the first process to save itself before the others end


def fit(job: Job) -> dict[str, Any] | None:
    """Quantize a checkpoint, or go on with what an interrupted run left; a finished one returns at once.

    Returns:
        The content of results.json; None from a process that is not the first of several, and where only some of the
        blocks were asked for.

    Raises:
        UserError: If something that the user gave can't be used.
        Interrupted: If a signal asked the run to end.
        PeerLost: If another process of the run is gone.
    """
    if not job.ranks.leads:
        follow(job)
        return None
    try:
        return lead(job)
    finally:
        job.ranks.announce(BEGUN, "ended")  # to those who still wait for it
        job.ranks.announce(ENDED)


def lead(job: Job) -> dict[str, Any] | None:
    """As the only process, or the first of several."""
    plain, tokenizer = open_checkpoint(job.checkpoint, job.device)
    prompt_ids = job.prompt.ids(tokenizer, plain.family.config)
    check_vocabulary(torch.tensor(prompt_ids), plain)
    scheme = job.transform.scheme(job.precision)
    check(job, plain, scheme)
    wanted = parse_blocks(job.blocks, plain.num_layers)
    store = RunStore(job.run_dir)
    with RunLock(job.run_dir) as lock:
        progress = store.open(fingerprint(job, plain), job.resume, job.independent)
        if progress.finished and progress.undamaged:
            store.clear()  # where the run was killed when it had just finished
            return store.results()

        if progress.tokens_NT is None and not progress.metrics:  # a walk that begins
            check_room(Budget.of(job, plain, scheme), job.device, job.run_dir)
        # Before the work, so that a mistake in a text, a task or a model shows at once.
        sets = evaluation_sets(job.evaluation, job.data.seq_len, job.seed, plain, tokenizer)
        fetch_tasks(job.evaluation.zero_shot)
        plain.head()
        tokens_NT = progress.tokens_NT
        if tokens_NT is None:
            tokens_NT = calibration_tokens(job, plain.checkpoint.folder, tokenizer)
            check_vocabulary(tokens_NT, plain)
        probe_BT = tokens_NT[:1, :64]
        transformed = transform(job, plain, None if progress.metrics else probe_BT)
        lock.claim()
        goes_on = not progress.finished and not progress.finished_blocks.issuperset(wanted)
        store.begin(job.config_yaml, tokens_NT)
        if progress.finished:  # what was lost beside the results is made again, or not needed
            return store.results()
        if goes_on:
            job.ranks.announce(BEGUN, "walk")
            walk(job, transformed, scheme, store, prompt_ids, tokens_NT, progress)
            job.ranks.wait_for(f"{WALKED}/{rank}" for rank in range(1, job.ranks.world))
            store.collect()
        job.ranks.announce(BEGUN, "ended")
        leave()  # or the metrics would be taken for those of all processes
        if job.blocks is not None:
            return None
        model = job.run_dir / "model"
        if not progress.published:
            names = type(job.transform).__name__, type(job.solver).__name__
            prompt = str(tokenizer.decode(prompt_ids))
            card = model_card(job.checkpoint, plain.checkpoint.folder, scheme, *names, prompt)
            save_model(model, transformed, store.block_digests(), scheme, prompt_ids, plain.dtype, probe_BT, card)
            store.publish_model()
        print("measuring", flush=True)  # or a log would be silent until the table
        quantized = open_quantized(model, job.device)
        perplexity = evaluate(plain, quantized, sets, prompt_ids, job.evaluation.batch_size, tokenizer)
        checkpoint = plain.checkpoint.folder
        scores = score_models(checkpoint, model, tokenizer, prompt_ids, job.evaluation, plain.dtype, job.device)
        sizes = {"checkpoint": size_on_disk(checkpoint), "model": size_on_disk(model)}
        store.finish(results(job, store, perplexity, scores, sizes))
    return store.results()


def follow(job: Job) -> None:
    """As one of the other processes: take part in the walk that the first one begins."""
    ranks = job.ranks
    job.signals.follow(lambda: ranks.wait_for([ENDED], PARTING))
    try:
        ranks.wait_for([BEGUN])
        if ranks.announced(BEGUN) != "walk":
            return
    except PeerLost:  # the first one had nothing to do, or has told what is wrong
        return
    plain, tokenizer = open_checkpoint(job.checkpoint, job.device)
    prompt_ids = job.prompt.ids(tokenizer, plain.family.config)
    store = RunStore(job.run_dir, ranks.rank)
    progress = store.join(job.independent)
    tokens_NT = progress.tokens_NT
    assert tokens_NT is not None
    scheme = job.transform.scheme(job.precision)
    walk(job, transform(job, plain, None), scheme, store, prompt_ids, tokens_NT, progress)
    ranks.announce(f"{WALKED}/{ranks.rank}")
    leave()


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
    """Calibrate the blocks that are left, or this process's part of them."""
    stages, members = job.arrangement()
    place = take_place(job.ranks, stages, members, job.device)
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
        ranks=job.ranks,
        share=place.share,
        independent=job.independent,
        memory=job.memory,
        streams=job.streams,
    )
    block_walk.partials = progress.partials
    # Resuming passes through finished blocks, which must give what they gave when they were finished.
    with block_walk, torch.compiler.set_stance("default" if compiles(job, model) else "force_eager"):
        if job.independent or place.stage > 0:
            block_walk.begin(tokens_NT)
        else:
            block_walk.resume(tokens_NT, progress)
        if job.independent:
            wanted = parse_blocks(job.blocks, model.num_layers)
            block_walk.relay = Independent(
                wanted, progress.finished_blocks, place, block_walk.inputs.fp, block_walk.prompt_1PD
            )
        elif stages > 1:
            left = range(len(progress.metrics), model.num_layers)
            block_walk.relay = Wavefront(left, place, block_walk.inputs.fp, block_walk.prompt_1PD)
        block_walk.run()


def calibration_tokens(job: Job, folder: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N, T] to calibrate on."""
    data = job.data
    if data.calibration == "self":
        return corpus.self_generated(folder, data.num_samples, data.seq_len, job.seed, job.device)
    return corpus.calibration_tokens(data, tokenizer, job.seed)


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
