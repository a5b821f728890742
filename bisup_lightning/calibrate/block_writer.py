"""Writes one finished block while the next is calibrated."""

from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisup_lightning.calibrate.run_store import RunStore
from bisup_lightning.data.transfer import side_stream


class BlockWriter:
    """Hands what is to be saved to the run directory, one piece at a time and in order.

    A failed write ends the walk when the next piece is saved, or with `close`; nothing that follows it is written.

    Args:
        store: The run directory. Nobody else writes there before `close`.
    """

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._executor = futures.ThreadPoolExecutor(1, thread_name_prefix="block-writer")
        self._writing: futures.Future[None] | None = None

    def save_block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        metrics: Mapping[str, Any],
        streams: Mapping[str, Tensor] | None = None,
        theta: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See `RunStore.save_block`; returns before it is done, but with streams, which the next block changes.

        Raises:
            OSError: If this, or what was saved before, can't be written.
        """
        self.wait()
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        computed = torch.cuda.current_stream().record_event() if on_gpu else None
        self._writing = self._executor.submit(self._save_block, computed, index, tensors, metrics, streams, theta)
        if streams is not None:
            self.wait()

    def _save_block(
        self, computed: torch.cuda.Event | None, index: int, tensors: Mapping[str, Tensor], *more: Any
    ) -> None:
        if computed is not None:
            tensors = _in_pinned_memory(tensors, computed)
        self.store.save_block(index, tensors, *more)

    def save_partial(self, index: int, attempt: int, step: int, write: Callable[[Path], None]) -> None:
        """See `RunStore.save_partial`; returns when it is done.

        Raises:
            OSError: If this, or what was saved before, can't be written.
        """
        self.wait()
        self.store.save_partial(index, attempt, step, write)

    def wait(self) -> None:
        """Wait until everything is saved.

        Raises:
            OSError: If it can't be written.
        """
        if self._writing is not None:
            futures.wait([self._writing])  # where a signal may strike: the write stays under way
            written, self._writing = self._writing, None
            written.result()

    def close(self) -> None:
        """As `wait`, for good.

        Raises:
            OSError: See `wait`.
        """
        try:
            self.wait()
        finally:
            self._executor.shutdown()


def _in_pinned_memory(tensors: Mapping[str, Tensor], computed: torch.cuda.Event) -> dict[str, Tensor]:
    """Copies of a GPU's tensors, beside what it computes. To other memory, they would keep threads from launching."""
    side = side_stream("writing", next(tensor.device for tensor in tensors.values() if tensor.is_cuda))
    with torch.cuda.stream(side):
        side.wait_event(computed)
        copies = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for name, tensor in tensors.items()
        }
    side.synchronize()
    return copies
