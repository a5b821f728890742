"""What a walk needs at the least of device, host and disk, from shapes alone, and whether that is there."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bisup_lightning.calibrate.driver import wanted_streams
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.calibrate.job import Job
from bisup_lightning.data.streams import StreamLocation, choose_place, free_host_bytes
from bisup_lightning.errors import UserError
from bisup_lightning.model.block import pack_layer
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.family import EMBEDDING, LINEAR_INPUTS
from bisup_lightning.quant.spec import Scheme

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes of the large things in a walk.

    Args:
        place: Where the streams live.
        stream: What a process holds of one stream of hidden states [N, T, D].
        block: A full-precision block as blocks compute with it.
        sequence: The widest input of a block's linears for one sequence.
        packed: A fused block on disk.
        shared: The artifact's tensors outside of the blocks.
        num_layers: Number of blocks.
        on_gpu: Whether blocks compute on a GPU, or on the host.
        copies: Streams of a step: x_fp, x_q and what becomes of x_q; a fourth where it learns on full-precision inputs
            first, while x_fp is the target.
        processes: How many of them share this host.
    """

    place: StreamLocation
    stream: int
    block: int
    sequence: int
    packed: int
    shared: int
    num_layers: int
    on_gpu: bool
    copies: int = 3
    processes: int = 1

    @classmethod
    def of(cls, job: Job, model: BlockwiseModel, scheme: Scheme) -> "Budget":
        """The budget of a job.

        Args:
            job: What is asked for.
            model: The full-precision model.
            scheme: The quantizers.
        """
        family, data, item = model.family, job.data, compute_dtype(job, model).itemsize
        shapes = family.layer_shapes(0)
        stream = data.num_samples * data.seq_len * family.hidden_size * item // job.arrangement()[1]
        widest = max(shapes[f"{entry.linears[0]}.weight"][1] for entry in LINEAR_INPUTS)
        tables = 1 + (model.head_name != EMBEDDING)
        packed = pack_layer(family.empty_layer(0), scheme, family.config).state_dict()
        return cls(
            place=choose_place(wanted_streams(job.streams, job.memory), stream, job.device),
            stream=stream,
            block=sum(shape.numel() for shape in shapes.values()) * item,
            sequence=data.seq_len * widest * item,
            packed=_stored(packed, model.storage_dtype),
            shared=tables * family.vocab_size * family.hidden_size * model.storage_dtype.itemsize,
            num_layers=family.num_layers,
            on_gpu=job.device.type == "cuda",
            copies=3 + (job.solver.fp_epochs > 0),
            processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # as the launcher and torchrun say
        )

    @property
    def streams(self) -> int:
        """All copies of one process."""
        return self.copies * self.stream

    @property
    def computing(self) -> int:
        """Where blocks compute: the block, its quantized form, and one sequence of it."""
        return 2 * self.block + self.sequence

    @property
    def device(self) -> int:
        """On a GPU."""
        return (self.computing + self.streams * (self.place == "device")) if self.on_gpu else 0

    @property
    def host(self) -> int:
        """On the host, of all its processes."""
        own = self.streams * (self.place == "host") + (self.packed if self.on_gpu else self.computing)
        return self.processes * own

    @property
    def disk(self) -> int:
        """In run_dir: blocks, which the model shares, and what it has beside them; streams if they live in files."""
        return self.num_layers * self.packed + self.shared + self.processes * self.streams * (self.place == "file")


def compute_dtype(job: Job, model: BlockwiseModel) -> torch.dtype:
    """What blocks and streams are in while they are calibrated: what a callback says, or the model's own."""
    walkers = (callback for callback in job.callbacks if isinstance(callback, WalkCallback))
    chosen = [dtype for callback in walkers if (dtype := callback.compute_dtype(job.device)) is not None]
    return chosen[-1] if chosen else model.dtype


def _stored(tensors: Mapping[str, Tensor], storage_dtype: torch.dtype) -> int:
    return sum(x.numel() * (storage_dtype if x.is_floating_point() else x.dtype).itemsize for x in tensors.values())


def free_disk_bytes(folder: Path) -> int:
    """Room where a folder is or would be made."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    """The path itself, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that can't be written, or can't be made, before any work.

    Args:
        key: The configuration key or option that names it.
        folder: Its path.

    Raises:
        UserError: Naming the key and what is in the way.
    """
    there = _nearest(folder)
    if not there.is_dir():
        raise UserError(f"{key}: {folder} can't be written, as {there} is no folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} can't be written, as {there} is not yours to write in; name another")


def check_room(budget: Budget, device: torch.device, run_dir: Path) -> None:
    """Refuse at once what can't be written or can't fit. A budget holds what is certain alone: more may not fit.

    Raises:
        UserError: With what is needed, what is there, and the setting that would make it fit.
    """
    check_folder("run_dir", run_dir)
    shorter, smaller = "give a smaller data.seq_len", "give a smaller data.num_samples or data.seq_len"
    if budget.on_gpu:
        key, remedy = ("streams", "give --streams host") if budget.place == "device" else ("data.seq_len", shorter)
        _refuse_over(key, budget.device, torch.cuda.mem_get_info(device)[0], "of device memory", remedy)
    if (free := free_host_bytes()) is not None:
        filled = budget.place == "host"
        key, remedy = ("data.num_samples", f"{smaller}, or --streams file") if filled else ("data.seq_len", shorter)
        _refuse_over(key, budget.host, free, "of host memory", remedy)
    remedy = "name a run_dir with more room" + (f", or {smaller}" if budget.place == "file" else "")
    _refuse_over("run_dir", budget.disk, free_disk_bytes(run_dir), f"on the disk of {run_dir}", remedy)


def _refuse_over(key: str, needed: int, free: int, where: str, remedy: str) -> None:
    if needed > free:
        raise UserError(
            f"{key}: at least {needed / GIB:.2f} GiB {where} are needed, and {free / GIB:.2f} are free; {remedy}"
        )
