"""A quantized block against the slow float64 block, and what learning, smoothing and fusing must keep."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bisup_lightning.calibrate.block_calibration import BlockCalibration, Optimization
from bisup_lightning.model import block
from bisup_lightning.model.block import (
    check_scheme,
    fuse_layer,
    is_clip,
    is_fused,
    learn_by_codes,
    pack_layer,
    quantize_layer,
    stored_tensors,
)
from bisup_lightning.model.blockwise import run_layer
from bisup_lightning.model.family import LINEAR_INPUTS, MLP_ACTIVATION, MLP_INPUT, linear_inputs
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import QuantSpec, Scheme
from tests import reference
from tests.model.tiny import (
    KINDS,
    family_of,
    full_precision_layer,
    positions_of,
    random_hidden,
    random_prompt,
    random_tensors,
    shape_of,
)

BATCH, LENGTH = 2, 6


@dataclass(frozen=True)
class Case:
    """One block, its quantizers and its Θ."""

    kind: str = "llama"
    bits: int = 4
    group_size: int | None = None
    granularity: str = "row"
    kv_granularity: str = "head"
    prompt: int = 0
    smoothing: str = "soft"
    low_rank: str = "slrec"
    seed: int = 0

    def __str__(self):
        parts = [self.kind, f"w{self.bits}a{self.bits}", f"g{self.group_size}", self.granularity, self.kv_granularity]
        return "-".join([*parts, f"p{self.prompt}", self.smoothing, self.low_rank])

    @property
    def scheme(self):
        spec = QuantSpec(self.bits, True, self.granularity, self.group_size)
        return Scheme(spec, spec, QuantSpec(self.bits, False, self.kv_granularity))

    @property
    def quantizers(self):
        hard = self.smoothing == "hard"
        return reference.Quantizers(
            self.bits, self.bits, self.bits, self.group_size, self.kv_granularity, hard, self.low_rank
        )


CASES = [
    Case(prompt=1, seed=1),
    Case("llama", 3, 8, prompt=3, seed=2),
    Case("llama-biased", 4, 8, smoothing="hard", prompt=1),
    Case("mistral", 3, kv_granularity="token", low_rank="lrec"),
    Case("qwen2", 4, prompt=2, seed=2),
    Case("qwen2", 3, 8, "group", smoothing="hard", low_rank="lrec", seed=3),
    Case("qwen3", 4, 8, kv_granularity="token", prompt=2, low_rank="lrec"),
    Case("qwen3", 3, granularity="tensor", prompt=4, seed=1),
]


CALIBRATION_SEED = {"llama": 1, "qwen2": 2, "qwen3": 0}


def reference_name(name):
    """The reference's name of a tensor of Θ."""
    for theirs, ours in ((".input_quantizer.clips.0", ".input_clip"), (".quantizer.clips.0", ".input_clip")):
        name = name.replace(theirs, ours)
    return name.replace(".clips.0", ".clip")


def named_theta(layer, hard):
    """Every tensor of Θ by the reference's name; a tied one under the norm's."""
    return {
        reference_name(name): parameter
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not (hard and name.endswith("_proj.smoothing"))
    }


def scatter_theta(layer, seed):
    """Move every tensor of Θ off its start."""
    generator = torch.Generator().manual_seed(3000 + seed)
    with torch.no_grad():
        for name, parameter in theta_parameters(layer).items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if is_clip(name):
                value = 0.6 + 0.4 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            elif name.endswith("smoothing"):
                value = torch.exp(0.3 * noise)
            else:
                value = 0.3 * noise
            parameter.copy_(value)


class Problem:
    """A case's tensors, inputs and Θ, all float32 numbers, so that a float64 and a float32 run have one reference."""

    def __init__(self, case):
        self.case, self.family = case, family_of(case.kind)
        width = self.family.hidden_size
        self.tensors = random_tensors(self.family, case.seed, torch.float32)
        self.prompt = random_prompt(case.seed, self.family, case.prompt, torch.float32) if case.prompt else None
        self.x_q = random_hidden(case.seed, BATCH, LENGTH, width, torch.float32)
        self.x_fp = self.x_q + 0.05 * random_hidden(case.seed + 50, BATCH, LENGTH, width, torch.float32)
        self.hard = case.smoothing == "hard"

    def layer(self, dtype):
        """The package's quantized block with Θ off its start."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        layer = full_precision_layer(self.family, tensors, exact_norms=dtype == torch.float64)
        quantize_layer(layer, self.case.scheme, self.family.config, 0.9, dtype)
        theta = Theta(smoothing=self.case.smoothing, smoothing_start="ones", low_rank=self.case.low_rank, rank=2)
        add_theta(layer, theta, torch.Generator().manual_seed(self.case.seed))
        scatter_theta(layer, self.case.seed)
        return layer.to(dtype)

    def kv(self, dtype):
        """Its keys and values."""
        prompt = None if self.prompt is None else tuple(part.to(dtype) for part in self.prompt)
        return BlockKV(KVQuantizer.of(self.case.scheme), prompt)

    def reference(self):
        """The slow quantized block, with leaves for Θ, and the slow full-precision block."""
        theta = named_theta(self.layer(torch.float32), self.hard)
        theta = {name: parameter.detach().double().requires_grad_() for name, parameter in theta.items()}
        shape = shape_of(self.family)
        quantized = reference.DecoderBlock(self.tensors, shape, self.case.quantizers, theta)
        return quantized, reference.DecoderBlock(self.tensors, shape)


def kind_of(name):
    """What kind of tensor in Θ the reference calls so: clip, smoothing, …"""
    return name.rsplit(".", 1)[1]


def relative(got, wanted):
    """‖got − wanted‖ / ‖wanted‖."""
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_loss_and_every_gradient_equal_the_reference(case):
    """To 1e-10 in float64, and to float32's precision in float32: no code may differ there, as none lies near a tie.

    In float32 a tensor of Θ is measured on the scale of all gradients of its kind: that of a lone clip value is a sum
    that may all but cancel.
    """
    problem = Problem(case)
    slow, full = problem.reference()
    with torch.no_grad():
        target = full(problem.x_fp, problem.prompt)
    wanted = slow(problem.x_q, problem.prompt)
    wanted_loss = (wanted - target).square().mean()
    wanted_loss.backward()
    # A step is at least 1/16 of an element, and a handful of float32 operations make an element: 2e-6 steps of error.
    assert slow.tie_distance > 2e-5

    for dtype, tolerance, gradient_tolerance in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-6, 3e-6)):
        layer, positions = problem.layer(dtype), positions_of(problem.family, LENGTH, case.prompt, dtype)
        got = run_layer(layer, problem.x_q.to(dtype), positions, problem.kv(dtype))
        loss = F.mse_loss(got, target.to(dtype))
        loss.backward()
        assert relative(got, wanted) < tolerance
        assert relative(loss, wanted_loss) < tolerance
        learned = named_theta(layer, problem.hard)
        assert learned.keys() == slow.theta.keys()
        norms = {}
        for name, theta in slow.theta.items():
            assert theta.grad.norm() > 0, name
            norms[kind_of(name)] = math.hypot(norms.get(kind_of(name), 0.0), theta.grad.norm().item())
        for name, parameter in learned.items():
            error = (parameter.grad.double() - slow.theta[name].grad).norm().item()
            scale = norms[kind_of(name)] if dtype == torch.float32 else slow.theta[name].grad.norm().item()
            assert error < gradient_tolerance * scale, name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_training_step_is_the_loss_of_equation_8(kind):
    """The Lightning module on transformers' own layer, norms included, against the slow block."""
    case = Case(kind, prompt=2, seed=CALIBRATION_SEED[kind])
    problem = Problem(case)
    slow, full = problem.reference()
    with torch.no_grad():
        target = full(problem.x_fp, problem.prompt)
        wanted = reference.block_loss(slow, problem.x_q, full, problem.x_fp, problem.prompt)
    assert slow.tie_distance > 2e-5
    positions = positions_of(problem.family, LENGTH, case.prompt, torch.float32)
    module = BlockCalibration(
        problem.layer(torch.float32), positions, problem.kv(torch.float32), Optimization(), steps=1
    )
    loss = module.training_step((problem.x_q, target.float()), 0)
    assert loss.dtype == torch.float32
    assert relative(loss, wanted) < 1e-6


# --- starts -----------------------------------------------------------------------------------------------------------


def quantized(kind, scheme, dtype=torch.float32, storage=None, seed=0, orders=None):
    """(family, quantized layer without Θ) around numbers that the storage dtype holds."""
    storage, family = storage or dtype, family_of(kind)
    tensors = {name: tensor.to(storage).to(dtype) for name, tensor in random_tensors(family, seed).items()}
    layer = full_precision_layer(family, tensors)
    return family, quantize_layer(layer, scheme, family.config, 0.9, storage, orders)


def output(family, layer, scheme, dtype=torch.float32, prompt_length=2):
    """The layer's output on random inputs behind a random prompt."""
    prompt = random_prompt(0, family, prompt_length, dtype)
    x = random_hidden(0, BATCH, LENGTH, family.hidden_size, dtype)
    with torch.no_grad():
        kv = BlockKV(KVQuantizer.of(scheme), prompt)
        return run_layer(layer, x, positions_of(family, LENGTH, prompt_length, dtype), kv)


def random_orders(family, seed=0):
    """A random order of the channels of every linear input."""
    generator = torch.Generator().manual_seed(seed)
    shapes = family.layer_shapes(0)
    return {
        entry.name: torch.randperm(shapes[f"{entry.linears[0]}.weight"][1], generator=generator)
        for entry in LINEAR_INPUTS
    }


SCHEMES = {
    "plain": Scheme(),
    "groups": Scheme(QuantSpec(3, group_size=8), QuantSpec(3, group_size=8), QuantSpec(3, False, "token")),
    "quarot": Scheme(hadamard=True),
    "atom": Scheme(QuantSpec(4, group_size=8), QuantSpec(4, group_size=8), outliers=8),
    "quik": Scheme(outliers=8, outlier_bits=None),
    "weights only": Scheme(QuantSpec(3, group_size=8), None, None),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
forms = pytest.mark.parametrize(("smoothing", "low_rank"), [("soft", "slrec"), ("hard", "lrec")])


def with_orders(family, scheme):
    return random_orders(family) if scheme.outliers else None


@every_scheme
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theta_at_a_start_of_ones_changes_nothing(scheme, smoothing, low_rank, dtype):
    family, layer = quantized("llama", scheme, dtype, orders=with_orders(family_of("llama"), scheme))
    before = output(family, layer, scheme, dtype)
    theta = Theta(smoothing=smoothing, smoothing_start="ones", low_rank=low_rank, rank=4)
    add_theta(layer, theta, torch.Generator().manual_seed(0))
    assert torch.equal(output(family, layer, scheme, dtype), before)


def absmax_of(family, tensors, x, positions):
    """Largest magnitude of each channel of each linear input, from a full-precision run."""
    layer = full_precision_layer(family, tensors)
    statistics = InputStatistics(layer)
    with torch.no_grad():
        run_layer(layer, x, positions, BlockKV())
    statistics.add_pass()
    return statistics.absmax


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("smoothing", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["llama-biased", "qwen2", "qwen3"])
def test_smoothquant_start_keeps_the_function_and_follows_the_formula(kind, smoothing, reordered):
    """s1·s2 = 1 channel by channel, in each consumer's own order, and s2 ∝ √(max|X| / max|W|)."""
    family = family_of(kind)
    tensors = random_tensors(family, 0)
    x, positions = random_hidden(0, BATCH, LENGTH, family.hidden_size), positions_of(family, LENGTH, 0, torch.float64)
    absmax = absmax_of(family, tensors, x, positions)
    orders = random_orders(family) if reordered else None
    scheme = Scheme(QuantSpec(8), None, None, outliers=8 if reordered else 0)
    layer = quantize_layer(full_precision_layer(family, tensors), scheme, family.config, 0.9, torch.float64, orders)
    theta = Theta(smoothing=smoothing, smoothing_start="smoothquant", low_rank="slrec", rank=2)
    add_theta(layer, theta, torch.Generator().manual_seed(0), absmax)
    layer = layer.double()
    plain = full_precision_layer(family, tensors)
    for entry, linears in linear_inputs(layer):
        if entry.norm is None:
            continue
        norm = layer.get_submodule(entry.norm)
        with torch.no_grad():
            smoothed = norm(x)  # nothing is rounded: activations are None
            for name, linear in zip(entry.linears, linears, strict=True):
                wanted = plain.get_submodule(name)(plain.get_submodule(entry.norm)(x))
                if reordered and entry is MLP_INPUT:  # whose linears' rows take the order of what they produce
                    wanted = wanted[..., orders[MLP_ACTIVATION.name]]
                got = F.linear(smoothed, linear.compensated_weight(), linear.bias)
                assert relative(got, wanted) < 1e-6  # the norm runs in float32
        strongest = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in entry.linears]).amax(0)
        formula = (absmax[entry.name].double() / strongest).sqrt()
        ratio = norm.smoothing.detach() * formula
        assert ratio.max() / ratio.min() < 1 + 1e-5
        assert norm.smoothing.detach().log().mean().abs() < 1e-5  # geometric mean one
        assert norm.smoothing.max() / norm.smoothing.min() > 1.5


@pytest.mark.parametrize("hadamard", [False, True])
def test_an_automatic_start_is_smoothquants_but_on_a_rotated_model(hadamard):
    """Which has no loud channels left: there it starts at ones, and a start of ones needs no statistics."""
    starts = {}
    for start in ("auto", "ones" if hadamard else "smoothquant"):
        family, layer = quantized("llama", Scheme(hadamard=hadamard))
        x, positions = (
            random_hidden(0, BATCH, LENGTH, family.hidden_size, torch.float32),
            positions_of(family, LENGTH, 0, torch.float32),
        )
        absmax = None if hadamard else absmax_of(family, random_tensors(family, 0, torch.float32), x, positions)
        add_theta(layer, Theta(smoothing_start=start, low_rank="none"), torch.Generator(), absmax)
        starts[start] = layer.input_layernorm.smoothing
    automatic, wanted = starts.values()
    assert torch.equal(automatic, wanted)
    assert automatic.eq(1).all() == hadamard


def test_smoothquant_evens_out_a_loud_channel():
    """The channel that `random_tensors` makes six times louder weighs less in the smoothed activation."""
    family = family_of("llama")
    tensors = random_tensors(family, 0, torch.float32)
    x = random_hidden(0, BATCH, LENGTH, family.hidden_size, torch.float32)
    absmax = absmax_of(family, tensors, x, positions_of(family, LENGTH, 0, torch.float32))
    layer = quantize_layer(
        full_precision_layer(family, tensors), Scheme(QuantSpec(4), None, None), family.config, 0.9, torch.float32
    )

    def loudness():
        with torch.no_grad():
            y = layer.input_layernorm(x).flatten(0, 1).abs().amax(0)
        return (y.max() / y.median()).item()

    before = loudness()
    add_theta(layer, Theta(low_rank="none"), torch.Generator(), absmax)
    assert loudness() < 0.7 * before


@pytest.mark.parametrize(
    ("theta", "learned"),
    [
        (Theta(True, "none", low_rank="none"), {"clip"}),
        (Theta(False, "soft", "ones", "none"), {"s1", "s2"}),
        (Theta(False, "hard", "ones", "none"), {"s1"}),
        (Theta(False, "none", low_rank="lrec"), {"a", "b"}),
        (Theta(True, "soft", "ones", "slrec"), {"clip", "s1", "s2", "a", "b"}),
    ],
    ids=["clip", "soft", "hard", "low-rank", "all"],
)
def test_only_what_is_asked_for_is_learned(theta, learned):
    scheme = Scheme()
    family, layer = quantized("llama", scheme)
    add_theta(layer, theta, torch.Generator().manual_seed(0))
    kinds = {".clip": "clip", ".input_clip": "clip", ".low_rank_a": "a", ".low_rank_b": "b"}
    seen = set()
    for name in named_theta(layer, theta.smoothing == "hard"):
        leaf = "." + name.rsplit(".", 1)[1]
        seen.add(kinds.get(leaf) or ("s2" if "_proj" in name else "s1"))
    assert seen == learned
    x = random_hidden(0, BATCH, LENGTH, family.hidden_size, torch.float32)
    positions = positions_of(family, LENGTH, 0, torch.float32)
    run_layer(layer, x, positions, BlockKV(KVQuantizer.of(scheme))).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# --- fusing -----------------------------------------------------------------------------------------------------------

PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32, stored bfloat16": (torch.float32, torch.bfloat16),
    "float32, stored float16": (torch.float32, torch.float16),
}


def fused_and_stored(scheme, smoothing, low_rank, dtype, storage):
    """A block's output with Θ, fused, and written and read again."""
    kind = "qwen3" if smoothing == "soft" else "llama-biased"
    family, layer = quantized(kind, scheme, dtype, storage, orders=with_orders(family_of(kind), scheme))
    add_theta(layer, Theta(smoothing=smoothing, smoothing_start="ones", low_rank=low_rank, rank=4), torch.Generator())
    scatter_theta(layer, 0)
    learned = output(family, layer, scheme, dtype)
    assert not is_fused(layer)
    fuse_layer(layer)
    assert is_fused(layer)
    assert not theta_parameters(layer)
    fused = output(family, layer, scheme, dtype)

    stored = stored_tensors(layer, storage)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {storage}
    again = pack_layer(family.empty_layer(0), scheme, family.config)
    read = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    again.load_state_dict(read, assign=True)
    return learned, fused, output(family, again, scheme, dtype)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@every_scheme
@forms
def test_fused_and_stored_block_computes_the_same_bits(scheme, smoothing, low_rank, precision):
    """Learning saw every number as it is stored: trained, fused, written and read again, the output is one."""
    learned, fused, read = fused_and_stored(scheme, smoothing, low_rank, *precision)
    assert torch.equal(read, fused)
    if scheme is not SCHEMES["quik"] or precision[0] == precision[1]:  # the rest in the next test
        assert torch.equal(fused, learned)


@forms
def test_unquantized_outliers_are_learned_as_they_are_stored(smoothing, low_rank):
    learned, fused, _ = fused_and_stored(SCHEMES["quik"], smoothing, low_rank, torch.float32, torch.bfloat16)
    assert torch.equal(fused, learned)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_weights(bits):
    """Fused without loss, in exactly that many bits, and each bit makes the block better."""
    schemes = [Scheme(QuantSpec(width), None, None) for width in (bits, max(bits - 1, 2))]
    errors = []
    for scheme in schemes:
        family, layer = quantized("llama", scheme)
        exact = full_precision_layer(family, random_tensors(family, 0, torch.float32))
        wanted = output(family, exact, scheme)
        before = output(family, layer, scheme)
        fuse_layer(layer)
        assert torch.equal(output(family, layer, scheme), before)
        errors.append(relative(before, wanted.double()))
    assert bits == 2 or errors[0] < 0.75 * errors[1]
    family, layer = quantized("llama", schemes[0])
    shapes = family.layer_shapes(0)
    codes = {name: tensor for name, tensor in fuse_layer(layer).state_dict().items() if name.endswith("codes")}
    for name, tensor in codes.items():
        rows, features = shapes[name.replace("segments.0.codes", "weight")]
        assert tensor.dtype == torch.uint8
        assert tensor.numel() * 8 == rows * features * bits  # all widths here are multiples of eight
    assert len(codes) == 7


@every_scheme
def test_quantize_layer_leaves_the_checkpoints_tensors_alone(scheme):
    family = family_of("llama-biased")
    tensors = random_tensors(family, 0, torch.float32)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    layer = quantize_layer(
        full_precision_layer(family, tensors), scheme, family.config, 0.9, torch.float32, with_orders(family, scheme)
    )
    add_theta(layer, Theta(smoothing_start="ones"), torch.Generator())
    scatter_theta(layer, 0)
    output(family, layer, scheme)
    fuse_layer(layer)
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@every_scheme
def test_a_layer_that_would_learn_by_codes_computes_the_same_and_is_fused_as_one_that_would_not(monkeypatch, scheme):
    """Codes come along with gradients alone; the factors of a gate, where they are not mixed, at any time."""
    monkeypatch.setattr(block, "multiplies", lambda *arguments: True)
    family, layer = quantized("llama", scheme, orders=with_orders(family_of("llama"), scheme))
    before, mlp = output(family, layer, scheme), layer.get_submodule("mlp")
    learn_by_codes(layer)
    assert ("forward" in vars(mlp)) is not scheme.hadamard
    assert torch.equal(output(family, layer, scheme), before)
    fuse_layer(layer)
    assert "forward" not in vars(mlp)
    assert torch.equal(output(family, layer, scheme), before)


# --- learning ---------------------------------------------------------------------------------------------------------


def calibration(theta, scheme, dtype=torch.float32):
    """A BlockCalibration with its batch and optimizer."""
    family, layer = quantized("llama", scheme, dtype, orders=with_orders(family_of("llama"), scheme))
    x = random_hidden(1, 4, LENGTH, family.hidden_size, dtype)
    positions, prompt = positions_of(family, LENGTH, 2, dtype), random_prompt(0, family, 2, dtype)
    exact = full_precision_layer(family, random_tensors(family, 0, dtype))
    statistics = InputStatistics(exact)
    with torch.no_grad():
        target = run_layer(exact, x, positions, BlockKV(None, prompt))
    statistics.add_pass()
    add_theta(layer, theta, torch.Generator().manual_seed(0), statistics.absmax)
    kv = BlockKV(KVQuantizer.of(scheme), prompt)
    module = BlockCalibration(layer, positions, kv, Optimization(schedule="constant"), steps=25)
    return module, (x, target), module.configure_optimizers()["optimizer"]


def learn(module, batch, optimizer, steps):
    """Losses of a few steps, as Lightning would take them."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = module.training_step(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


VARIANTS = {
    "clip": Theta(True, "none", low_rank="none"),
    "soft": Theta(False, "soft", low_rank="none"),
    "hard": Theta(False, "hard", low_rank="none"),
    "slrec": Theta(False, "none", low_rank="slrec", rank=4),
    "lrec": Theta(False, "none", low_rank="lrec", rank=4),
    "all": Theta(rank=4),
}


@pytest.mark.parametrize("theta", VARIANTS.values(), ids=VARIANTS)
def test_each_part_of_theta_alone_lowers_the_loss(theta):
    module, batch, optimizer = calibration(theta, Scheme(QuantSpec(3), QuantSpec(4)))
    losses = learn(module, batch, optimizer, 25)
    assert min(losses[-3:]) < 0.93 * losses[0]
    with torch.no_grad():
        last = module.loss(module.layer, *batch, module.positions, module.kv)
        fuse_layer(module.layer)
        assert torch.equal(module.loss(module.layer, *batch, module.positions, module.kv), last)


@every_scheme
def test_learning_lowers_the_loss_under_every_scheme(scheme):
    module, batch, optimizer = calibration(Theta(rank=4), scheme)
    losses = learn(module, batch, optimizer, 25)
    assert min(losses[-3:]) < 0.7 * losses[0]


def test_bfloat16_gradients_point_where_float32_ones_do():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        module, batch, _ = calibration(Theta(smoothing_start="ones", rank=4), SCHEMES["weights only"], dtype)
        module.training_step(batch, 0).backward()
        learned = theta_parameters(module.layer).values()
        gradients.append([parameter.grad.flatten() for parameter in learned if parameter.grad is not None])
    exact, narrow = (torch.cat(one) for one in gradients)
    assert narrow.dtype == torch.float32
    assert F.cosine_similarity(narrow, exact, 0) > 0.9


def test_clip_values_learn_at_their_own_rate():
    """Every tensor of Θ is in the group of its kind."""
    module, _, optimizer = calibration(Theta(rank=4), Scheme())
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    wanted = Optimization()
    for name, parameter in theta_parameters(module.layer).items():
        kind = {"smoothing": wanted.smoothing_lr, "low_rank_a": wanted.low_rank_lr, "low_rank_b": wanted.low_rank_lr}
        assert rates[id(parameter)] == kind.get(name.rsplit(".", 1)[1], wanted.clip_lr), name


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(QuantSpec(4, group_size=16), None), ["precision.weights", "16", "24", "q_proj"]),
        (Scheme(QuantSpec(4), QuantSpec(4, group_size=12)), ["precision.activations", "12", "40", "down_proj"]),
        (Scheme(outliers=24), ["24", "q_proj"]),
        (Scheme(QuantSpec(4, group_size=24), outliers=8), ["precision.weights", "24", "16"]),
    ],
)
def test_check_scheme_names_what_does_not_fit(scheme, words):
    with pytest.raises(ValueError, match="precision") as caught:
        check_scheme(family_of("llama"), scheme)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("kind", KINDS)
def test_check_scheme_lets_pass_what_quantize_layer_can_do(kind):
    for scheme in SCHEMES.values():
        check_scheme(family_of(kind), scheme)
        family, layer = quantized(kind, scheme, orders=with_orders(family_of(kind), scheme))
        assert output(family, layer, scheme).isfinite().all()
