"""Several processes that speak by gloo, without a launcher, for tests of what goes on between them."""

import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.processes import CONTEXT


def together(world: int, folder: Path, work: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """What `work(rank, world, *arguments)` returns in each of so many processes.

    Raises:
        AssertionError: If one raises, with its trace, or is not done in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [CONTEXT.Process(target=_one, args=(rank, world, folder, work, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert not hung, f"ranks {hung} are not done in {seconds} s"
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _one(rank: int, world: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        result = work(rank, world, *arguments)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
