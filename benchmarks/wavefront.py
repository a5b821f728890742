"""How long several GPUs would take, from what one GPU needs and what blocks wait for: no GPU is used.

    python -m benchmarks.wavefront --shape 70b --forward_seconds 0.75 --gigabytes_per_second 200

Every block passes, in units of one forward pass over the text: full-precision pass 1, epochs of 3 (forward and
backward), the fused block's outputs and the start's loss, 1 each. In a wavefront the last epoch waits for what the
fused predecessor gives; the start's loss on a sample comes before the outputs leave, that on all of the text behind.
The walk is played through event by event.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import EPOCH_PASSES, EPOCHS, FLOOR_PASSES, LENGTH, SEQUENCES, SHAPES
from bisup_lightning.calibrate.candidate import SAMPLE

PASS = 1.0  # a forward pass, the unit


@dataclass(frozen=True)
class Played:
    """What a walk took.

    Args:
        seconds: From the first block's beginning to the last one's end.
        busy: Share of all stages' time that they computed.
        bytes_sent: By one process to its successor, in all.
    """

    seconds: float
    busy: float
    bytes_sent: float


def play(
    blocks: int,
    stages: int,
    forward: float,
    stream_bytes: float,
    bandwidth: float,
    independent: bool = False,
    undivided: float = 0.0,
) -> Played:
    """Play a walk through.

    Args:
        blocks: Of the model.
        stages: Which take turns at them.
        forward: Seconds of one forward pass of a block over the text, on one stage.
        stream_bytes: Size of one member's part of a stream.
        bandwidth: Bytes per second from stage to stage; messages are sent beside the computation.
        independent: Whether blocks learn on full-precision inputs, so that nothing but those is waited for and sent.
        undivided: Seconds of a block's first epochs beside that.
    """
    chained = stages > 1 and not independent  # whose last epoch waits for the predecessor
    travel = stream_bytes / bandwidth if stages > 1 else 0.0
    sample = SAMPLE / (SEQUENCES * LENGTH) * PASS if chained else 0.0
    free = [0.0] * stages
    target = given = float("-inf")  # when the predecessor's full-precision and fused outputs are there
    for block in range(blocks):
        now = max(free[block % stages], target) + PASS * forward
        target = now + travel
        now += (EPOCHS - 1) * EPOCH_PASSES * forward + undivided
        if chained:
            now = max(now, given)
        now += (EPOCH_PASSES + sample + PASS) * forward
        given = now + travel
        free[block % stages] = now + PASS * forward
    seconds = max(free)
    busy = blocks * ((FLOOR_PASSES + PASS + sample) * forward + undivided) / (seconds * stages)
    messages = (blocks - 1) * (1 + chained) if stages > 1 else 0
    return Played(seconds, busy, messages * stream_bytes / stages)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--forward_seconds", type=float, required=True, help="of one block over the text, on one GPU")
    parser.add_argument("--gigabytes_per_second", type=float, default=200.0, help="from GPU to GPU")
    parser.add_argument(
        "--undivided_seconds", type=float, default=0.0, help="of a block on one GPU that members do not divide"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    blocks, stream = shape.blocks, SEQUENCES * LENGTH * shape.hidden * 2  # bytes of bfloat16
    one = play(blocks, 1, given.forward_seconds, stream, 1.0).seconds
    units = FLOOR_PASSES + PASS
    table = Table(
        "GPUs", "mode", "stages × members", "minutes", "speed-up", "of the ideal", "busy", "sent by each (GB)",
        "streams of each (GB)",
    )  # fmt: skip
    for gpus in given.gpus:
        ways = [("wavefront" if stages > 1 else "data", stages) for stages in range(1, EPOCHS + 1) if not gpus % stages]
        for mode, stages in [*ways, ("independent", min(gpus, blocks))]:
            members = 1 if mode == "independent" else gpus // stages
            if members > 8:  # a batch of 8 has no more parts
                continue
            undivided = given.undivided_seconds * (members > 1)
            divided = given.forward_seconds - undivided / units
            played = play(
                blocks, stages, divided / members, stream / members, 1e9 * given.gigabytes_per_second,
                mode == "independent", undivided,
            )  # fmt: skip
            copies = 4 if mode == "wavefront" else 3  # inputs, target, outputs; in a wavefront, those on their way
            table.add_row(
                str(gpus), mode, f"{stages} × {members}", f"{played.seconds / 60:.1f}", f"{one / played.seconds:.2f}",
                f"{100 * one / played.seconds / gpus:.0f} %", f"{100 * played.busy:.0f} %",
                f"{played.bytes_sent / 1e9:.0f}", f"{copies * stream / members / 1e9:.1f}",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
