"""A transform that breaks the model is caught before anything is quantized."""

import pytest
import torch

from bisup_lightning.errors import UserError
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD
from bisup_lightning.transform.invariance import TOLERANCE, check_invariance, relative_logit_error
from bisup_lightning.transform.rotate import RotatedCheckpoint
from tests.transform.models import CPU, blockwise, tokens


class WithMeanSubtracted(RotatedCheckpoint):
    """RMSNorm is not mean-invariant."""

    def read_shared(self, name, device, dtype):
        tensor = super().read_shared(name, device, dtype)
        return tensor - tensor.mean(-1, keepdim=True) if name == EMBEDDING else tensor


class WithTiedHead(RotatedCheckpoint):
    """The final norm is folded into the head only; an embedding in its place lacks it."""

    def read_shared(self, name, device, dtype):
        return super().read_shared(EMBEDDING if name == HEAD else name, device, dtype)


class WithFinalNorm(RotatedCheckpoint):
    """The final norm's weight is in the head already."""

    def read_shared(self, name, device, dtype):
        if name == FINAL_NORM:
            return super(RotatedCheckpoint, self).read_shared(name, device, dtype)
        return super().read_shared(name, device, dtype)


class WithoutValueBias(RotatedCheckpoint):
    """Biases rotate, too."""

    def read_layer(self, index, device, dtype=None):
        plain = super(RotatedCheckpoint, self).read_layer(index, device, dtype)
        return {**super().read_layer(index, device, dtype), "self_attn.v_proj.bias": plain["self_attn.v_proj.bias"]}


class WithOneBlockLeftOut(RotatedCheckpoint):
    """The last block in the old basis."""

    def read_layer(self, index, device, dtype=None):
        return (super(RotatedCheckpoint, self) if index == 1 else super()).read_layer(index, device, dtype)


class WithNaN(RotatedCheckpoint):
    """What a division by nothing would leave."""

    def read_layer(self, index, device, dtype=None):
        tensors = super().read_layer(index, device, dtype)
        tensors["mlp.down_proj.weight"][0, 0] = torch.nan
        return tensors


BROKEN = [WithMeanSubtracted, WithTiedHead, WithFinalNorm, WithoutValueBias, WithOneBlockLeftOut, WithNaN]


def through(folder, kind):
    plain = blockwise(folder)
    checkpoint = kind(plain.checkpoint, plain.family, CPU, seed=0)
    return plain, BlockwiseModel(folder, CPU, torch.float32, checkpoint=checkpoint)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_rotation_is_refused_in_one_line(checkpoint_of, kind):
    plain, broken = through(checkpoint_of("qwen2, tied, six heads"), kind)
    with pytest.raises(UserError, match="transform: full-precision logits change") as caught:
        check_invariance(plain, broken, tokens(16, 1))
    assert "\n" not in str(caught.value)


def test_a_sound_rotation_passes_far_below_the_tolerance(checkpoint_of):
    plain, rotated = through(checkpoint_of("qwen2, tied, six heads"), RotatedCheckpoint)
    assert check_invariance(plain, rotated, tokens(16, 1)) < TOLERANCE / 10


def test_the_error_is_relative_and_zero_for_the_same_model(checkpoint_of):
    plain = blockwise(checkpoint_of("qwen2"))
    assert relative_logit_error(plain, plain, tokens()) == 0

    class Louder(RotatedCheckpoint):
        def read_shared(self, name, device, dtype):
            return super().read_shared(name, device, dtype) * (1.25 if name == HEAD else 1)

    assert relative_logit_error(*through(checkpoint_of("qwen2"), Louder), tokens()) == pytest.approx(0.25, rel=1e-3)
