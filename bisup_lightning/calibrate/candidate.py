"""Whether a solution is better than its block's start, which takes its place if not."""

import logging
from dataclasses import dataclass

from torch import Tensor

from bisup_lightning.calibrate.solvers import Block, Solution
from bisup_lightning.data.layer_inputs import Forward, LayerInputs

SAMPLE = 2**15  # tokens on which a solution is compared with its start before its successor waits any longer
CLEARLY = 0.95  # of the start's loss: on more than that, all of the text decides
ALIKE = 0.1  # by which the solution's loss on the sample and on all of the text may differ; else likewise

log = logging.getLogger(__name__)


@dataclass
class Candidate:
    """A solution on probation.

    Args:
        solution: The fused block.
        outputs_NTD: What it gives for x_q, in the streams' dtype.
        loss: Their mean square error, a float32 scalar on the device.
    """

    solution: Solution
    outputs_NTD: Tensor
    loss: Tensor


def keep_the_better(candidate: Candidate, start: Solution, start_loss: Tensor | float, block: Block) -> Tensor | float:
    """Put the start in a candidate's place unless that is better, and send the outputs on.

    Where final inputs come late, the successor waits for these outputs. So a sample of the text decides there if it
    leaves no doubt, and the start's loss on all of the text is computed when the outputs are under way.

    Args:
        candidate: What was found; the start where nothing was.
        start: The block's start.
        start_loss: Its mean square error on x_q, where that is known: final inputs do not come late.
        block: Whose they are.

    Returns:
        The start's mean square error.
    """
    inputs, relay, run_start = block.inputs, block.relay, block.run(start.layer)
    sample_decides = relay.final_inputs_come_late and clearly_better(candidate, run_start, inputs)
    if relay.final_inputs_come_late and not sample_decides:  # judged on the inputs that the candidate is judged on
        start_loss = inputs.loss_q(run_start)
    if not (sample_decides or candidate.solution is start or candidate.loss < start_loss):  # NaN is not less, either
        candidate.solution = start
        del candidate.outputs_NTD  # or there would be one copy more
        candidate.outputs_NTD, candidate.loss = inputs.outputs_q(run_start)
    relay.send_final(candidate.outputs_NTD)
    if sample_decides:
        start_loss = inputs.loss_q(run_start)
        if not candidate.loss < start_loss:
            log.warning(f"block {block.index} is worse than its start on all of the text, though not on a sample")
    return start_loss


def clearly_better(candidate: Candidate, run_start: Forward, inputs: LayerInputs) -> bool:
    """Whether a few sequences leave no doubt that a candidate is better than the start.

    They do not speak for the others where the candidate's own loss is another there: a few tokens of the text may make
    up most of it.
    """
    sample = sample_size(inputs)
    on_sample = inputs.loss_of(candidate.outputs_NTD, sample)
    speaks_for_all = (on_sample - candidate.loss).abs() < ALIKE * candidate.loss  # false if NaN
    return bool(speaks_for_all & (on_sample < CLEARLY * inputs.loss_q(run_start, sample)))


def sample_size(inputs: LayerInputs) -> int:
    """Sequences of the sample, of all processes that share the text."""
    return -(-SAMPLE // inputs.fp.shape[1])
