"""The two streams: in batches, and still what one straightforward computation gives."""

import pytest
import torch

from bisup_lightning.data.layer_inputs import LayerInputs

CPU = torch.device("cpu")


def streams(count=7, tokens=5, hidden=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, tokens, hidden, generator=generator).to(dtype) for _ in range(2))


def block(seed):
    """Some function of a sequence that mixes its tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight_DD = torch.randn(6, 6, generator=generator)

    def run(x_BTD):
        return (x_BTD.cumsum(1) @ weight_DD.to(x_BTD.dtype)).tanh()

    return run


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])  # 3 leaves a partial batch of one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_streams_walk_as_whole_tensors_would(batch_size, dtype):
    x_fp, x_q = streams(dtype=dtype)
    inputs = LayerInputs(x_fp.clone(), x_q.clone(), CPU, batch_size)
    fp, quantized = block(1), block(2)
    inputs.advance_fp(fp)
    target, outputs = fp(x_fp), quantized(x_q)
    assert inputs.fp.dtype == dtype
    torch.testing.assert_close(inputs.fp, target, rtol=1e-6, atol=1e-6)
    assert torch.equal(inputs.q, x_q)

    found, loss = inputs.outputs_q(quantized)
    torch.testing.assert_close(found, outputs, rtol=1e-6, atol=1e-6)
    assert torch.equal(inputs.q, x_q)  # not yet
    exact = (outputs.double() - target.double()).square().mean().item()
    assert loss == pytest.approx(exact, rel=1e-6)
    assert inputs.mean_square_target() == pytest.approx(target.double().square().mean().item(), rel=1e-6)

    inputs.advance_q(found)
    torch.testing.assert_close(inputs.q, outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.fp, target, rtol=1e-6, atol=1e-6)


def test_the_same_block_on_the_same_inputs_has_no_loss():
    x_fp, _ = streams()
    inputs = LayerInputs(x_fp.clone(), x_fp.clone(), CPU, 3)
    run = block(1)
    inputs.advance_fp(run)
    assert inputs.outputs_q(run)[1] == 0


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(7, 3, [3, 3, 1]), (4, 2, [2, 2]), (2, 8, [2])])
def test_each_sequence_passes_once_and_in_order(count, batch_size, sizes):
    x_fp, x_q = streams(count)
    inputs, seen = LayerInputs(x_fp.clone(), x_q.clone(), CPU, batch_size), []
    inputs.for_each_q(lambda x_BTD: seen.append(x_BTD.clone()) or x_BTD)
    assert [len(batch) for batch in seen] == sizes
    assert torch.equal(torch.cat(seen), x_q)
    assert torch.equal(inputs.q, x_q)
    assert inputs.num_tokens == count * 5


def test_a_large_loss_is_summed_without_overflow_and_a_small_one_without_loss():
    """bf16 outputs, float32 squares, float64 sums: 3e38 and 1e-12 alike."""
    x = torch.ones(64, 5, 6, dtype=torch.bfloat16)
    for size in (1e18, 1e-6):
        inputs = LayerInputs(torch.zeros_like(x), x.clone(), CPU, 8)
        assert inputs.outputs_q(lambda x_BTD, size=size: x_BTD * size)[1] == pytest.approx(size**2, rel=0.02)


def test_nothing_is_kept_for_a_backward_pass():
    x_fp, x_q = streams()
    inputs = LayerInputs(x_fp, x_q, CPU, 3)
    weight = torch.randn(6, 6, requires_grad=True)
    inputs.advance_fp(lambda x_BTD: x_BTD @ weight)
    outputs, _ = inputs.outputs_q(lambda x_BTD: x_BTD @ weight)
    assert not inputs.fp.requires_grad
    assert not outputs.requires_grad


@pytest.mark.parametrize(("sample", "count"), [(1, 1), (4, 4), (7, 7), (8, 7), (None, 7)])
def test_the_loss_on_a_sample_is_that_of_the_first_sequences(sample, count):
    x_fp, x_q = streams()
    inputs, run = LayerInputs(x_fp, x_q, CPU, 3), block(2)
    exact = (run(x_q[:count]).double() - x_fp[:count].double()).square().mean().item()
    assert inputs.loss_q(run, sample) == pytest.approx(exact, rel=1e-6)
