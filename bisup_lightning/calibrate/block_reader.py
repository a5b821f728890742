"""Reads the next block while a GPU calibrates one."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from bisup_lightning.model.blockwise import BlockwiseModel


class BlockReader:
    """Gives the tensors of one block after another; on a GPU each is read, moved there and transformed beforehand.

    Args:
        model: The full-precision model; its dtype may be set until the first block is read.
    """

    def __init__(self, model: BlockwiseModel) -> None:
        self.model = model
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` on the device; on a GPU, the block behind it is read from now on.

        Raises:
            UserError: If the checkpoint is damaged.
        """
        if self._stream is None:  # a CPU has nothing to do it beside
            return self.model.layer_tensors(index)
        known, future = self._next or (-1, None)
        if future is None or known != index:
            future = self._executor.submit(self._read, index, self._stream)
        tensors = future.result()
        following = index + 1
        if following < self.model.num_layers:
            self._next = following, self._executor.submit(self._read, following, self._stream)
        return tensors

    def _read(self, index: int, stream: torch.cuda.Stream) -> dict[str, Tensor]:
        with torch.cuda.stream(stream):  # beside the kernels of the block at hand
            tensors = self.model.layer_tensors(index)
        stream.synchronize()
        for tensor in tensors.values():  # from here on, the walk's own stream uses this memory
            tensor.record_stream(torch.cuda.default_stream(self.model.device))
        return tensors

    def close(self) -> None:
        """Wait for what is still being read."""
        self._executor.shutdown(cancel_futures=True)
