"""Starts one process for each device of this host, and ends all if one dies."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import bisup_lightning


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command line in several processes, by torch's elastic launcher, as torchrun does.

    Args:
        arguments: Of the command line.
        processes: How many.

    Returns:
        The exit code of the process that failed first, 128 + the number of a signal that ended them, else 0.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process would warn for pages when another ends
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its account of a failure would fill a page
    package = str(Path(bisup_lightning.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the host's own name may be one that can't be resolved
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "bisup_lightning", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} was ended by {name}; the same command goes on from here", file=sys.stderr)
            return 128 - failure.exitcode
        if failure.exitcode not in (2, 130, 143):  # which have said why
            print(f"error: rank {rank} failed (exit code {failure.exitcode}); see above", file=sys.stderr)
        return failure.exitcode
    return 0
