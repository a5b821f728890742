"""Figures of one model against the text and against a reference, by definition."""

import math

import pytest
import torch
from torchmetrics.text import Perplexity

from bisup_lightning.evaluate.metrics import LanguageModelMetrics


def problem(count=8, tokens=12, vocabulary=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 3 * torch.randn(count, tokens, vocabulary, generator=generator)
    reference_BTV = logits_BTV + torch.randn(logits_BTV.shape, generator=generator)
    return logits_BTV, torch.randint(vocabulary, (count, tokens), generator=generator), reference_BTV


def figures(*updates):
    metrics = LanguageModelMetrics()
    for update in updates:
        metrics.update(*update)
    return metrics.compute()


def test_perplexity_is_torchmetrics():
    logits_BTV, ids_BT, _ = problem()
    judge = Perplexity()
    judge.update(logits_BTV[:, :-1], ids_BT[:, 1:])
    assert figures((logits_BTV, ids_BT)) == {"perplexity": pytest.approx(judge.compute().item(), rel=1e-6)}


def test_logits_that_know_nothing_have_the_vocabulary_as_perplexity():
    ids_BT = torch.arange(20).view(2, 10)
    assert figures((torch.zeros(2, 10, 32), ids_BT))["perplexity"] == pytest.approx(32, rel=1e-6)


def test_logits_that_know_all_have_one_and_only_the_successor_counts():
    ids_BT = torch.randint(32, (2, 10), generator=torch.Generator().manual_seed(0))
    next_BT = ids_BT.roll(-1, 1)
    assert figures((100.0 * torch.nn.functional.one_hot(next_BT, 32), ids_BT))["perplexity"] == pytest.approx(1)
    spoilt = 100.0 * torch.nn.functional.one_hot(next_BT, 32)
    spoilt[:, -1] = torch.randn(32)  # the last token's logits predict nothing that is there
    assert figures((spoilt, ids_BT))["perplexity"] == pytest.approx(1)


def test_identical_logits_diverge_by_nothing_and_always_agree():
    logits_BTV, ids_BT, _ = problem()
    found = figures((logits_BTV, ids_BT, logits_BTV))
    assert found["kl"] == 0.0
    assert found["top1"] == 1.0


def test_a_constant_added_to_all_logits_is_no_difference():
    logits_BTV, ids_BT, _ = problem()
    found = figures((logits_BTV, ids_BT, logits_BTV + 5))
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"] == 1.0


def test_divergence_and_agreement_by_definition():
    """KL from the reference to the model, in nats, token by token; the tokens of the text have no part in it."""
    logits_BTV, ids_BT, reference_BTV = problem()
    log_q, log_p = (x[:, :-1].double().log_softmax(-1).flatten(0, 1) for x in (logits_BTV, reference_BTV))
    kl = [sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True)) for ps, qs in zip(log_p.tolist(), log_q.tolist(), strict=True)]  # fmt: skip  # noqa: E501
    same = [ps.argmax() == qs.argmax() for ps, qs in zip(log_p, log_q, strict=True)]
    found = figures((logits_BTV, ids_BT, reference_BTV))
    assert found["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert found["top1"] == pytest.approx(sum(map(int, same)) / len(same))
    assert 0 < found["top1"] < 1
    other_text = figures((logits_BTV, ids_BT.flip(1), reference_BTV))
    assert (other_text["kl"], other_text["top1"]) == (found["kl"], found["top1"])
    reverse = figures((reference_BTV, ids_BT, logits_BTV))
    assert reverse["kl"] != pytest.approx(found["kl"], rel=1e-3)


def test_parts_add_up_whatever_their_size():
    logits_BTV, ids_BT, reference_BTV = problem()
    whole = figures((logits_BTV, ids_BT, reference_BTV))
    cuts = [slice(0, 1), slice(1, 6), slice(6, 8)]
    parts = figures(*((logits_BTV[cut], ids_BT[cut], reference_BTV[cut]) for cut in cuts))
    assert parts == {name: pytest.approx(value, rel=1e-6) for name, value in whole.items()}


def test_a_part_is_divided_by_what_it_summed():
    """Three of eight sequences give the perplexity of these three; the whole is the mean of logs by tokens."""
    logits_BTV, ids_BT, reference_BTV = problem()
    part, rest = (
        figures((logits_BTV[cut], ids_BT[cut], reference_BTV[cut])) for cut in (slice(0, 3), slice(3, 8))
    )  # fmt: skip
    nll = -logits_BTV[:3, :-1].log_softmax(-1).gather(-1, ids_BT[:3, 1:, None])
    assert part["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    whole = figures((logits_BTV, ids_BT, reference_BTV))
    logs = 3 / 8 * math.log(part["perplexity"]) + 5 / 8 * math.log(rest["perplexity"])
    assert math.log(whole["perplexity"]) == pytest.approx(logs, rel=1e-6)
    assert whole["kl"] == pytest.approx(3 / 8 * part["kl"] + 5 / 8 * rest["kl"], rel=1e-6)


def test_many_tokens_are_summed_without_drift():
    """A float32 sum of two million values near eleven would be off in the fifth digit."""
    logits_BTV = torch.zeros(1, 2049, 2)
    metrics = LanguageModelMetrics()
    for _ in range(1000):
        metrics.update(logits_BTV, torch.zeros(1, 2049, dtype=torch.int64))
    assert metrics.compute()["perplexity"] == pytest.approx(2, rel=1e-6)


def test_bf16_logits_are_compared_in_float32():
    logits_BTV, ids_BT, reference_BTV = (x.bfloat16() if x.is_floating_point() else x for x in problem())
    exact = figures((logits_BTV.double().float(), ids_BT, reference_BTV.double().float()))
    assert figures((logits_BTV, ids_BT, reference_BTV)) == exact
