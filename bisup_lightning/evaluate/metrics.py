"""How well logits predict text, and how close they are to a reference's.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class LanguageModelMetrics(Metric):
    """Perplexity, mean KL divergence from reference logits, and how often the likeliest token is the same.

    Sums are float64 and divided by the number of tokens that were summed, so that any subset gives its own figure.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    kl: Tensor
    same_top1: Tensor
    compared: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "kl", "same_top1", "compared"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits_BTV: Tensor, ids_BT: Tensor, reference_BTV: Tensor | None = None) -> None:
        """Add sequences: logits at a token predict the next one, T − 1 targets each."""
        logits = logits_BTV[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        self.nll += nll.double()
        self.tokens += ids_BT[:, 1:].numel()
        if reference_BTV is None:
            return
        reference = reference_BTV[:, :-1].float()
        log_q, log_p = logits.log_softmax(-1), reference.log_softmax(-1)
        self.kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).double()
        self.same_top1 += (logits.argmax(-1) == reference.argmax(-1)).sum()
        self.compared += logits.shape[0] * logits.shape[1]

    def compute(self) -> dict[str, float]:
        """`perplexity`, and `kl` (nats) and `top1` (share) if there was a reference."""
        figures = {"perplexity": (self.nll / self.tokens).exp().item()}
        if self.compared > 0:
            figures |= {"kl": (self.kl / self.compared).item(), "top1": (self.same_top1 / self.compared).item()}
        return figures
