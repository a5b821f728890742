"""Runs of the command line in processes of their own, forked from one that has imported all and computed nothing.

A process may be killed, and what is patched in it is gone with it; it starts in a hundredth of an interpreter's time.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "bisup_lightning.cli", "callbacks.bf16", "callbacks.checkpoint", "callbacks.fuse", "callbacks.progress",
        "tests.tools", "tests.file_faults", "torch.utils.tensorboard", "torch._dynamo",
        "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama",
    ]
)  # fmt: skip


class Run:
    """One run of the command line.

    Args:
        arguments: Of the command line.
        prepare: What the process does first; importable by name, as it is sent there.
        environment: Variables that it sets first.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        prepare: Callable[[], object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._printed = Path(tempfile.mkdtemp(prefix="bisup-run-"))
        target = (list(arguments), prepare, dict(environment or {}), self._printed)
        self._process = CONTEXT.Process(target=_run, args=target)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, signum)

    def ends_within(self, seconds: float) -> bool:
        """Wait until it has ended, or so long."""
        self._process.join(seconds)
        return not self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Of a run that has ended."""
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """The exit code (−9 for SIGKILL), and what was written to stderr.

        Raises:
            TimeoutError: If it does not end in time; it is killed then.
        """
        if not self.ends_within(seconds):
            self._process.kill()
            raise TimeoutError(f"not ended in {seconds} s; stderr: {self.stderr}")
        stderr = self.stderr
        for path in self._printed.iterdir():
            path.unlink()
        self._printed.rmdir()
        assert self._process.exitcode is not None
        return self._process.exitcode, stderr

    @property
    def stderr(self) -> str:
        """What was written there so far."""
        path = self._printed / "2"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _run(
    arguments: list[str], prepare: Callable[[], object] | None, environment: dict[str, str], printed: Path
) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(printed / str(descriptor), os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from bisup_lightning.cli import main

    sys.exit(main(arguments))


def ranks(world: int, arguments: Sequence[str], second: Sequence[str] | None = None) -> list[Run]:
    """Runs of the command line that know of each other, as torchrun would start them; one with other arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        Run(
            second if rank == 1 and second is not None else arguments,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def wait_for_all(runs: Sequence[Run], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and stderr of each; as soon as one fails the others are ended, as the launcher does."""
    end = time.monotonic() + seconds
    while any(not run.ends_within(0.02) for run in runs):
        failed = any(run.ends_within(0) and run.exit_code for run in runs)
        if failed or time.monotonic() > end:
            for run in runs:
                if not run.ends_within(1.0):
                    run.signal(signal.SIGKILL)
    return [run.wait() for run in runs]


def finish(world: int, arguments: Sequence[str]) -> None:
    """A run of so many processes that must succeed."""
    ended = wait_for_all(ranks(world, arguments))
    assert [code for code, _ in ended] == [0] * world, "\n".join(stderr for _, stderr in ended)
