"""One run from checkpoint to artifact: check, walk, assemble, evaluate. Every step finds what an earlier try left."""

import platform
import resource
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from transformers import PreTrainedTokenizerBase

import bisup_lightning
from bisup_lightning.calibrate.budget import Budget, check_room
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.job import Job, check, checkpoint_digests, compiles, fingerprint
from bisup_lightning.calibrate.measure import check_vocabulary, fetch_sets, measure, open_checkpoint
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
from bisup_lightning.data.share import WHOLE, PeerLost, Share
from bisup_lightning.errors import UserError
from bisup_lightning.hub.card import model_card
from bisup_lightning.hub.save import save_model
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.quant.spec import Scheme
from bisup_lightning.run_layout import MODEL
from bisup_lightning.transform.invariance import check_invariance

# What the processes of a run tell each other, by key of the store that they share. What is announced first under a key
# holds, and is heard by those, too, who ask later (see `Ranks.announce`).
#
# BEGUN     By the first process. WALK: the run directory is ready, so that the others join and calibrate their part.
#           NO_WALK: no block is left to calibrate, or it never came to that; the others, who have waited, end. `fit`
#           announces it on every way out, which means nothing where there was a walk.
# ASKED, CHECKPOINT  By the first process, before that: how blocks are calibrated, and where its checkpoint lies. The
#           others compare that with what they were asked for, and all else by the run's fingerprint.
# WALKED/r  By process r, when all that it wrote is in its manifest. The first one waits for each of the others before
#           it takes their manifests over, publishes and measures; they end meanwhile.
# ENDED     By the first process on every way out. Where a signal asks all processes to end, the others wait for it, for
#           PARTING seconds at most: the first one may still be saving what they calibrate together.
#
# None of this tells that a process died. The launcher then ends the others, which may see it before by a broken
# connection (PeerLost).
BEGUN, ASKED, CHECKPOINT, WALKED, ENDED = "begun", "asked", "checkpoint", "walked", "ended"
WALK, NO_WALK = "walk", "ended"  # what is announced under BEGUN
PARTING = 25.0  # seconds
PROBE_TOKENS = 64  # of the calibration text, on which the transform and the published model are checked


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
        job.ranks.announce(BEGUN, NO_WALK)  # to those who still wait for it
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
        prompt_ids = prompt_ids if progress.prompt_ids is None else progress.prompt_ids
        if progress.finished and progress.undamaged:
            store.clear()  # where the run was killed when it had just finished
            return store.results()
        prepared = prepare(job, plain, tokenizer, scheme, progress)
        lock.claim()
        store.begin(job.config_yaml, prepared.tokens_NT, prompt_ids)
        if progress.finished:  # what was lost beside the results is made again, or not needed
            return store.results()
        if not progress.finished_blocks.issuperset(wanted):
            job.ranks.announce(ASKED, arrangement(job))
            job.ranks.announce(CHECKPOINT, place_of(plain))
            job.ranks.announce(BEGUN, WALK)
            calibrate_blocks(job, prepared.transformed, scheme, store, prompt_ids, prepared.tokens_NT, progress)
            job.ranks.wait_for(f"{WALKED}/{rank}" for rank in range(1, job.ranks.world))
            store.collect()
        job.ranks.announce(BEGUN, NO_WALK)
        leave()  # or the metrics would be taken for those of all processes
        if job.blocks is not None:
            return None
        if not progress.published:
            publish(job, plain, tokenizer, scheme, store, prompt_ids, prepared)
        print("measuring", flush=True)  # or a log would be silent until the table
        measured = measure(plain, job.run_dir / MODEL, tokenizer, prompt_ids, job.evaluation, prepared.sets)
        store.finish(results(job, plain, store, measured))
    return store.results()


@dataclass(frozen=True)
class Prepared:
    """What the first process has at hand before it writes anything.

    Args:
        sets: Token ids [N, T] of every set to measure on, by name.
        tokens_NT: Token ids to calibrate on.
        probe_BT: A few of them, to check the transform and the published model with.
        transformed: The full-precision model behind its transform.
    """

    sets: Mapping[str, torch.Tensor]
    tokens_NT: torch.Tensor
    probe_BT: torch.Tensor
    transformed: BlockwiseModel


def prepare(
    job: Job, plain: BlockwiseModel, tokenizer: PreTrainedTokenizerBase, scheme: Scheme, progress: Progress
) -> Prepared:
    """Get all that the run needs, before the work, so that a mistake in a text, a task or a model shows at once.

    Raises:
        UserError: If something can't be had or used, or a run that begins can't fit.
    """
    if progress.tokens_NT is None and not progress.metrics:  # a walk that begins
        check_room(Budget.of(job, plain, scheme), job.device, job.run_dir)
    sets = fetch_sets(job.evaluation, job.data.seq_len, job.seed, plain, tokenizer)
    plain.head()
    tokens_NT = progress.tokens_NT
    if tokens_NT is None:
        tokens_NT = calibration_tokens(job, plain.checkpoint.folder, tokenizer)
        check_vocabulary(tokens_NT, plain)
    probe_BT = tokens_NT[:1, :PROBE_TOKENS]
    transformed = transformed_model(job, plain, None if progress.metrics else probe_BT)
    return Prepared(sets, tokens_NT, probe_BT, transformed)


def publish(
    job: Job,
    plain: BlockwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    store: RunStore,
    prompt_ids: list[int],
    prepared: Prepared,
) -> None:
    """Put the model together from the finished blocks, audit it, and record that it is complete.

    Raises:
        AuditError: If it does not pass.
    """
    names = type(job.transform).__name__, type(job.solver).__name__
    prompt = str(tokenizer.decode(prompt_ids))
    card = model_card(job.checkpoint, plain.checkpoint.folder, scheme, *names, prompt)
    model, blocks = job.run_dir / MODEL, store.block_digests()
    save_model(model, prepared.transformed, blocks, scheme, prompt_ids, plain.dtype, prepared.probe_BT, card)
    store.publish_model()


def arrangement(job: Job) -> str:
    """How a run's blocks are calibrated, beside what its fingerprint tells."""
    stages, blocks = job.parallel.stages, job.blocks
    return f"parallel.mode {job.parallel.mode}, parallel.stages {stages}, blocks {blocks}, memory {job.memory}"


def place_of(plain: BlockwiseModel) -> str:
    """Where a checkpoint lies: in the same place it is the same, which takes no hashing of all its weights."""
    return f"{socket.gethostname()}:{plain.checkpoint.folder.resolve()}"


def follow(job: Job) -> None:
    """As one of the other processes: take part in the walk that the first one begins."""
    ranks = job.ranks
    job.signals.follow(lambda: ranks.wait_for([ENDED], PARTING))
    try:
        ranks.wait_for([BEGUN])
        if ranks.announced(BEGUN) != WALK:
            return
    except PeerLost:  # the first one had nothing to do, or has told what is wrong
        return
    if arrangement(job) != (first := ranks.announced(ASKED)):
        raise UserError(f"a process was asked for {arrangement(job)}, but the first one for {first}")
    plain, _ = open_checkpoint(job.checkpoint, job.device)
    store = RunStore(job.run_dir, ranks.rank)
    is_the_same = place_of(plain) == ranks.announced(CHECKPOINT)
    digests = {} if is_the_same else checkpoint_digests(plain)
    progress = store.join(job.independent, {**job.settings, **digests})
    tokens_NT, prompt_ids = progress.tokens_NT, progress.prompt_ids
    assert tokens_NT is not None
    assert prompt_ids is not None
    scheme = job.transform.scheme(job.precision)
    model = transformed_model(job, plain, None)
    calibrate_blocks(job, model, scheme, store, prompt_ids, tokens_NT, progress)
    ranks.announce(f"{WALKED}/{ranks.rank}")
    leave()


def transformed_model(job: Job, plain: BlockwiseModel, probe_BT: torch.Tensor | None) -> BlockwiseModel:
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


def calibrate_blocks(
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
    walk = make_walk(job, model, scheme, store, prompt_ids, place.share)
    walk.partials = progress.partials
    # Resuming passes through finished blocks, which must give what they gave when they were finished.
    with walk, compile_stance(job, model):
        if job.independent or place.stage > 0:
            walk.begin(tokens_NT)
        else:
            walk.resume(tokens_NT, progress)
        if job.independent:
            wanted = parse_blocks(job.blocks, model.num_layers)
            walk.relay = Independent(wanted, progress.finished_blocks, place, walk.inputs.fp, walk.prompt_1PD)
        elif stages > 1:
            left = range(len(progress.metrics), model.num_layers)
            walk.relay = Wavefront(left, place, walk.inputs.fp, walk.prompt_1PD)
        walk.run()


def make_walk(
    job: Job,
    model: BlockwiseModel,
    scheme: Scheme,
    store: RunStore,
    prompt_ids: Sequence[int],
    share: Share = WHOLE,
) -> BlockWalk:
    """The walk over a model's blocks that a job asks for.

    Args:
        job: What was asked for.
        model: The full-precision model behind its transform.
        scheme: The quantizers.
        store: Where finished blocks go.
        prompt_ids: Token ids of the prompt.
        share: The part of the text that this process holds.
    """
    return BlockWalk(
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
        share=share,
        independent=job.independent,
        memory=job.memory,
        streams=job.streams,
    )


def compile_stance(job: Job, model: BlockwiseModel) -> AbstractContextManager[Any]:
    """Lets blocks be compiled where a job wants that, and nowhere else, from this call to the end of its `with`."""
    return torch.compiler.set_stance("default" if compiles(job, model) else "force_eager")


def calibration_tokens(job: Job, folder: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N, T] to calibrate on."""
    data = job.data
    if data.calibration == "self":
        return corpus.self_generated(folder, data.num_samples, data.seq_len, job.seed, job.device)
    return corpus.calibration_tokens(data, tokenizer, job.seed)


def size_on_disk(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def results(job: Job, plain: BlockwiseModel, store: RunStore, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json.

    Args:
        job: What was asked for.
        plain: The full-precision model.
        store: The run directory, with all blocks and the model.
        measured: What the model is worth, from `measure`.
    """
    blocks = [store.read_metrics(index) for index in range(len(store.block_digests()))]
    seconds = sum(block["seconds"] for block in blocks)
    tokens = job.data.num_samples * job.data.seq_len * len(blocks)
    on_gpu = job.device.type == "cuda"
    return {
        "checkpoint": job.checkpoint,
        **measured,
        "bytes": {
            "checkpoint": size_on_disk(plain.checkpoint.folder),
            "model": size_on_disk(job.run_dir / MODEL),
        },
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
