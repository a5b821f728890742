"""Several processes at one model: who they are, how they are arranged, where they stand."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from bisup_lightning.calibrate.link import Link
from bisup_lightning.data.share import WHOLE, Share, waiting_for_peers
from bisup_lightning.errors import UserError

Mode = Literal["none", "data", "wavefront", "independent"]
PATIENCE = timedelta(hours=2)  # with a peer that is silent but not known to be dead; a block's epoch takes minutes


@dataclass(frozen=True)
class Parallel:
    """How several processes work at one model; see docs/parallel.md.

    Args:
        mode: `data`: each holds a part of the text, and of every batch; `wavefront`: each calibrates a block, and
            blocks that follow each other learn at the same time; `independent`: each block is calibrated on
            full-precision inputs; `none`: one process calibrates block after block.
        stages: Blocks that learn at the same time in a wavefront; the processes of each share the text. As many as
            there are processes or epochs unless given.
    """

    mode: Mode = "none"
    stages: int | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and (self.mode != "wavefront" or self.stages < 1):
            raise ValueError(f"parallel.stages must be 1 or more, and goes with parallel.mode wavefront: {self.stages}")

    def arrange(self, world: int, epochs: int, batch_size: int, num_sequences: int) -> tuple[int, int]:
        """Stages, and members of each, for so many processes.

        Raises:
            UserError: If they can't be arranged.
        """
        stages = 1
        if self.mode == "none" and world > 1:
            raise UserError(f"parallel.mode: choose data, wavefront or independent for {world} processes")
        if self.mode == "independent":
            stages = world
        elif self.mode == "wavefront":
            if epochs == 1 and world > 1:
                raise UserError("parallel.mode: wavefront needs a solver that learns over several epochs; choose data")
            stages = self.stages or max(s for s in range(1, min(world, epochs) + 1) if world % s == 0)
            if stages > epochs or world % stages:
                raise UserError(
                    f"parallel.stages: {stages} must divide the {world} processes and not exceed the {epochs} epochs"
                )
        members = world // stages
        if batch_size % members or (members > 1 and num_sequences % batch_size):
            raise UserError(
                f"data.batch_size: {batch_size} must be a multiple of the {members} processes that share a batch, and "
                f"data.num_samples ({num_sequences}) a multiple of data.batch_size"
            )
        return stages, members


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, each of which has its rank; by itself, one.

    Args:
        rank: This process's.
        world: How many there are.
        store: What they know in common.
    """

    rank: int = 0
    world: int = 1
    store: dist.Store | None = None

    @property
    def leads(self) -> bool:
        """Whether it is the first, which alone reads the text, writes the manifest and measures."""
        return self.rank == 0

    def tell(self, key: str, value: str) -> None:
        """Let all know something that changes."""
        if self.store is not None:
            with waiting_for_peers():
                self.store.set(key, value)

    def announce(self, key: str, value: str = "") -> None:
        """Let all know something; what was announced first holds."""
        if self.store is not None:
            with waiting_for_peers():
                self.store.compare_set(key, "", value or "yes")

    def heard(self, key: str) -> bool:
        """Whether something was announced."""
        with waiting_for_peers():
            return self.store is not None and self.store.check([key])

    def wait_for(self, keys: Iterable[str], seconds: float = float("inf")) -> None:
        """Wait until all is announced, or so long; a signal is heard meanwhile."""
        end = time.monotonic() + seconds
        for key in keys:
            while not self.heard(key) and time.monotonic() < end:
                time.sleep(0.05)

    def announced(self, key: str) -> str:
        """What was announced."""
        assert self.store is not None
        with waiting_for_peers():
            return self.store.get(key).decode()


def environment() -> ClusterEnvironment | None:
    """The environment of one process of several, as torchrun or SLURM started it.

    Raises:
        UserError: If SLURM has several tasks, but this is its batch script: the others would never come.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        if "SLURM_STEP_NUM_TASKS" not in os.environ:
            raise UserError(f"SLURM has {tasks} tasks, but only this process runs: begin the command with srun")
        return SLURMEnvironment()
    return None


def own_device(local_rank: int, visible: int) -> int:
    """Which of the devices that it sees a process takes: by its rank on the host, or the only one that it was given.

    Raises:
        UserError: If it has none for itself.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(f"trainer.devices: process {local_rank} of this host has no device; it has {visible}")
    return local_rank


def join(place: ClusterEnvironment, device: torch.device) -> Ranks:
    """Meet the other processes."""
    rank, world = place.global_rank(), place.world_size()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher, which outlives the first
    with waiting_for_peers():
        store: dist.Store = dist.TCPStore(
            place.main_address, place.main_port, is_master=rank == 0 and not hosted, timeout=PATIENCE
        )  # fmt: skip
        # An agent's store outlives the processes that it starts anew, whose messages are not those of before.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=PATIENCE
        )
    return Ranks(rank, world, dist.PrefixStore("run", store))


def leave() -> None:
    """Take part in no more messages; what was announced can still be heard."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Place:
    """Where a process stands among stages of equally many members each.

    Args:
        stages: See `Parallel`.
        members: Processes of each stage.
        stage: This one's.
        member: Which one of the stage it is.
        share: The part of the text that it holds.
        upstream: From its like in the stage before; None where there is only one stage.
        downstream: To its like in the stage behind.
    """

    stages: int = 1
    members: int = 1
    stage: int = 0
    member: int = 0
    share: Share = WHOLE
    upstream: Link | None = field(default=None, compare=False)
    downstream: Link | None = field(default=None, compare=False)


def take_place(ranks: Ranks, stages: int, members: int, device: torch.device) -> Place:
    """Find this process's place. All processes call it together, once."""
    stage, member = divmod(ranks.rank, members)
    share, links = WHOLE, {}
    with waiting_for_peers():
        if members > 1:  # all take part in making every group
            groups = [dist.new_group(range(s * members, (s + 1) * members), timeout=PATIENCE) for s in range(stages)]
            share = Share(member, members, groups[stage])
        if stages > 1:
            for s in range(stages):
                for m in range(members):
                    sender, receiver = s * members + m, (s + 1) % stages * members + m
                    group, name = dist.new_group([sender, receiver], timeout=PATIENCE), f"{sender}-{receiver}"
                    if ranks.rank == sender:
                        links["downstream"] = Link(receiver, group, device, ranks, name)
                        links["downstream"].connect(sending=True)
                    if ranks.rank == receiver:
                        links["upstream"] = Link(sender, group, device, ranks, name)
                        links["upstream"].connect(sending=False)
    return Place(stages, members, stage, member, share, **links)


def parse_blocks(text: str | None, num_blocks: int) -> range:
    """The blocks that `8:16` means: 8 to 15.

    Raises:
        UserError: If it means none of the model's.
    """
    if text is None:
        return range(num_blocks)
    numbers: Sequence[Any] = text.split(":")
    try:
        first, end = (int(number) for number in numbers)
    except ValueError:
        first = end = -1
    if not 0 <= first < end <= num_blocks:
        raise UserError(f"blocks: {text} must be first:end with 0 <= first < end <= {num_blocks}, as in 0:{num_blocks}")
    return range(first, end)
