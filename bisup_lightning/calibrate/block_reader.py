"""Reads the next block while a GPU calibrates one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor, nn

from bisup_lightning.data.transfer import side_stream
from bisup_lightning.errors import UserError
from bisup_lightning.model.blockwise import BlockwiseModel

BlockAndTensors = tuple[nn.Module, dict[str, Tensor]]


class BlockReader:
    """Gives one block after another; on a GPU each can be read, moved there, transformed and built beforehand.

    Args:
        model: The full-precision model; its dtype may be set until the first block is read.
        let_go: Frees memory that is kept for speed alone.

    Attributes:
        end: Behind the last block that will be asked for.
    """

    def __init__(self, model: BlockwiseModel, let_go: Callable[[], object] = lambda: None) -> None:
        self.model, self.end, self.let_go = model, model.num_layers, let_go
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._ahead: dict[int, Future[BlockAndTensors]] = {}
        self._stream = side_stream("reading", model.device) if model.device.type == "cuda" else None
        if self._stream is not None:
            self._take_one_core()

    def _take_one_core(self) -> None:
        """Copy to pinned memory alone: many threads of several processes keep those that launch kernels from a core."""
        threads = torch.get_num_threads()
        self._executor.submit(torch.get_num_threads).result()  # or it would yet take the setting of all
        self._executor.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # or threads that begin later would have one, too

    def read(self, index: int) -> BlockAndTensors:
        """Block `index`, ready to run once, and its tensors on the device.

        Raises:
            UserError: If the checkpoint is damaged, or the device is too small.
        """
        if self._stream is None:
            tensors = self.model.layer_tensors(index)
            return self.model.layer(index, tensors), tensors
        with suppress(torch.OutOfMemoryError):  # beside a training, maybe, which has ended by now
            return self._take(index)
        self.let_go()
        torch.cuda.empty_cache()
        try:
            return self._take(index)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"streams: the device has no room for block {index} beside them; choose host or file"
            ) from error

    def _take(self, index: int) -> BlockAndTensors:
        self.read_ahead(index)
        return self._ahead.pop(index).result()

    def read_ahead(self, index: int) -> None:
        """Begin to read a block, if there is such a one, while the device has something else to do."""
        if self._stream is not None and index < self.end and index not in self._ahead:
            self._ahead[index] = self._executor.submit(self._read, index, self._stream)

    def _read(self, index: int, stream: torch.cuda.Stream) -> BlockAndTensors:
        with torch.cuda.stream(stream):  # beside the kernels of the block at hand
            tensors = self.model.layer_tensors(index)
        stream.synchronize()
        for tensor in tensors.values():  # from here on, the walk's own stream uses this memory
            tensor.record_stream(torch.cuda.default_stream(self.model.device))
        return self.model.layer(index, tensors), tensors

    def close(self) -> None:
        """Wait for what is still being read."""
        self._executor.shutdown(cancel_futures=True)
