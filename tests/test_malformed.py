"""Values that no key can have, made from the parser's own types; configurations from strangers.

Each ends in exit code 2 and one line that names the key or the file, before a directory is made or a class imported.
"""

import dataclasses
import functools
import inspect
import json
import math
import sys
import types
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bisup_lightning import cli
from bisup_lightning.calibrate.run_reader import digest_of
from bisup_lightning.calibrate.solvers import Solver
from bisup_lightning.cli import main
from bisup_lightning.files import sha256, write_json
from bisup_lightning.transform.reorder import Atom
from bisup_lightning.transform.rotate import QuaRot
from bisup_lightning.transform.transform import Transform
from tests.inputs import fit_command
from tests.tools import traces

FEW = settings(
    max_examples=3, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


# --- the keys, from the parser ----------------------------------------------------------------------------------------


def subclasses(kind):
    """All below a class."""
    return {below for child in kind.__subclasses__() for below in {child} | subclasses(child)}


def parts(kind):
    """The members of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def parameters(kind):
    """Name and type of what a class is made from."""
    hints = typing.get_type_hints(kind.__init__)
    return {name: hints[name] for name in inspect.signature(kind).parameters}


def leaves(key, kind):
    """`(key, type, how to nest a value there in a configuration)` of every leaf below a key."""

    def nest(value):
        nested = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        return nested

    for part in parts(kind):
        if part in (Solver, Transform):
            assert {Atom, QuaRot} < subclasses(Transform)  # which are known once they are imported
            for chosen in sorted(subclasses(part), key=lambda one: one.__name__):
                for name, inner in parameters(chosen).items():
                    for below, leaf, wrap in leaves(name, inner):
                        path = f"{chosen.__module__}.{chosen.__name__}"
                        yield f"{key}.{below}", leaf, functools.partial(_in_class, nest, path, wrap)
            return
        if dataclasses.is_dataclass(part):
            for name, inner in parameters(part).items():
                yield from leaves(f"{key}.{name}", inner)
            return
    yield key, kind, nest


def _in_class(nest, path, wrap, value):
    return nest({"class_path": path, "init_args": wrap(value)})


def all_leaves():
    for action in cli.fit_parser()._actions:
        if (kind := getattr(action, "_typehint", None)) is not None and "help" not in action.dest:
            yield from leaves(action.dest, kind)


LEAVES = list(all_leaves())
each_leaf = pytest.mark.parametrize(("key", "kind", "nest"), LEAVES, ids=[key for key, _, _ in LEAVES])


# --- the values -------------------------------------------------------------------------------------------------------


def accepts(kind, value):
    """Whether a value, as YAML gives it, may be of a type; generous, so that what is left over is surely wrong."""
    kind = typing.get_origin(kind) if typing.get_origin(kind) not in (None, typing.Literal) else kind
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        return isinstance(value, int | float)
    if kind in (bool, type(None)):
        return isinstance(value, bool | None | int)
    if kind is str or (inspect.isclass(kind) and issubclass(kind, str)):
        return isinstance(value, str)
    return isinstance(value, str) if not isinstance(value, dict | list) else False


WORDS = st.text("qwxyz", min_size=3, max_size=8)  # no number, no truth value, no class, no choice
ANYTHING = st.one_of(
    WORDS,
    st.integers(2, 9),
    st.floats(1.25, 9.75).filter(lambda number: number != int(number)),
    st.booleans(),
    st.lists(st.dictionaries(WORDS, WORDS, min_size=1, max_size=1), min_size=1, max_size=2),
    st.dictionaries(WORDS, st.one_of(WORDS, st.integers()), min_size=1, max_size=2),
)


def malformed(kind):
    """Values that a type does not accept."""
    return ANYTHING.filter(lambda value: not any(accepts(part, value) for part in parts(kind)))


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Building the parser takes longer than using it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_parser", "fit_parser"):
            patch.setattr(cli, name, functools.cache(getattr(cli, name)))
        yield


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(arguments, "names", …)`: the line of a `fit` that is refused; its run directory is not made."""

    def check(arguments, *words):
        run = tmp_path / "never"
        capsys.readouterr()
        assert main(["fit", "--checkpoint=/no/such", f"--run_dir={run}", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, captured.err
        for word in ("error: ", *words):
            assert word in captured.err
        assert not run.exists()
        return captured.err

    return check


@pytest.fixture
def file_refused(refused, tmp_path):
    """The same of a configuration, given as a value or as bytes."""

    def check(content, *words):
        file = tmp_path / "config.yaml"
        file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return refused(["--config=configs/solver/rtn.yaml", f"--config={file}"], *words)

    return check


def test_the_parser_has_the_keys_that_are_tested():
    keys = {key for key, _, _ in LEAVES}
    assert len(LEAVES) >= 50
    assert {
        "seed", "resume", "precision.weights.bits", "precision.kv.group_size", "solver.theta.rank", "solver.damp",
        "solver.optimization.clip_lr", "transform.outliers", "data.num_samples", "trainer.deterministic",
    } <= keys  # fmt: skip


@each_leaf
def test_a_value_of_another_type_is_refused_by_its_key(file_refused, key, kind, nest):
    @FEW
    @given(malformed(kind))
    def check(value):
        file_refused(nest(value), key.split(".")[0], key.split(".")[-1])

    check()


NOT_NULL = [(key, nest) for key, kind, nest in LEAVES if not {type(None), typing.Any} & set(parts(kind))]


@pytest.mark.parametrize(("key", "nest"), NOT_NULL, ids=[key for key, _ in NOT_NULL])
def test_a_null_is_refused_by_its_key(file_refused, key, nest):
    line = file_refused(nest(None), key.split(".")[0], key.split(".")[-1])
    assert "NoneType" not in line


@pytest.mark.parametrize("key", ["precision", "data", "prompt", "evaluation", "parallel", "trainer", "transform"])
def test_nothing_for_a_group_of_keys_is_refused_by_its_name(file_refused, key):
    file_refused({key: None}, f"{key}: must not be null")


NUMBERS = [(key, kind, nest) for key, kind, nest in LEAVES if {int, float} & set(parts(kind))]


@pytest.mark.parametrize(("key", "kind", "nest"), NUMBERS, ids=[key for key, _, _ in NUMBERS])
@pytest.mark.parametrize("number", [-1, -(10**30), 10**30, math.nan, math.inf, -math.inf], ids=str)
def test_a_number_that_makes_no_sense_is_refused_by_its_key(file_refused, key, kind, nest, number):
    file_refused(nest(number), key.split(".")[0], key.split(".")[-1])


# --- configurations from strangers ------------------------------------------------------------------------------------


FILES = {
    "an object that runs a command": b"seed: !!python/object/apply:os.mkdir [ran]\n",
    "a name of Python's": b"seed: !!python/name:os.system\n",
    "a module of Python's": b"data: !!python/module:os\n",
    "deep nesting": b"seed: " + b"[" * 20_000,
    "deeper nesting": b"{a: " * 100_000,
    "no UTF-8": b"seed: \xff\xfe\n",
    "a null character": b"seed: \0\n",
    "tabs": b"data:\n\tseed: 1\n",
    "an alias of nothing": b"seed: *nothing\n",
    "an alias of itself": b"data: &a [*a]\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a list": b"- 1\n",
    "a word": b"seed\n",
    "a number": b"3\n",
    "a number for a key": b"3: 4\n",
    "a list for a key": b"[1, 2]: 3\n",
    "an empty key": b"'': 1\n",
    "a dotted key": b"data.nonsense: 1\n",
    "an unknown key": b"trainer: {plugins: []}\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused_and_runs_nothing(file_refused, tmp_path, monkeypatch, content):
    file_refused(content)
    assert not (tmp_path / "ran").exists()


def test_a_bomb_of_aliases_is_refused_in_no_time(file_refused):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    file_refused("\n".join(lines).encode(), "config.yaml", "more than 100000 values")


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, where Python finds it."""
    trace = tmp_path / "imported"
    (tmp_path / "stranger.py").write_text(
        f"from bisup_lightning.calibrate.solvers import RTN\nopen({str(trace)!r}, 'w')\nclass Own(RTN):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: trace.exists() or "stranger" in sys.modules
    sys.modules.pop("stranger", None)


PLACES = {
    "solver": {"solver": {"class_path": "stranger.Own"}},
    "a class alone": {"solver": "stranger.Own"},
    "transform": {"transform": {"class_path": "stranger.Own"}},
    "a callback": {"trainer": {"callbacks": [{"class_path": "stranger.Own"}]}},
    "one callback": {"trainer": {"callbacks": {"class_path": "stranger.Own"}}},
    "a logger": {"trainer": {"logger": {"class_path": "stranger.Own"}}},
    "a profiler": {"trainer": {"profiler": {"class_path": "stranger.Own"}}},
    "an accelerator": {"trainer": {"accelerator": {"class_path": "stranger.Own"}}},
    "a precision": {"precision": {"kv": {"class_path": "stranger.Own"}}},
    "inside of a class": {
        "solver": {
            "class_path": "bisup_lightning.calibrate.solvers.BiSup",
            "init_args": {"theta": {"class_path": "stranger.Own"}},
        }
    },
    "a function inside of a class": {
        "trainer": {
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "stranger.Own"}}
            ]
        }
    },
}


@pytest.mark.parametrize("config", PLACES.values(), ids=PLACES)
def test_a_class_from_elsewhere_is_not_even_imported(file_refused, stranger, config):
    file_refused(config, next(iter(config)))
    assert not stranger()


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "stranger.Own", "torch.load"])
def test_a_class_from_elsewhere_on_the_command_line_is_not_imported(refused, stranger, path):
    for key in ("solver", "transform", "trainer.callbacks+", "trainer.logger"):
        refused([f"--{key}={path}"], key.strip("+").split(".")[-1])
    assert not stranger()


def test_a_file_cannot_grant_trust(file_refused, stranger):
    file_refused({"trust_classes_from": ["stranger"], "solver": {"class_path": "stranger.Own"}})
    assert not stranger()


@pytest.mark.parametrize("module", ["", "*", "a b", "jsonargparse", "../stranger"])
def test_trust_needs_a_module(refused, module):
    refused([f"--trust_classes_from={module}"], "--trust_classes_from", "name a module")


def test_an_option_of_trust_without_a_module_is_refused(refused):
    refused(["--trust_classes_from"], "--trust_classes_from", "name a module")


def test_test_does_not_import_what_a_runs_configuration_names(make_checkpoint, text_file, stranger, tmp_path, capsys):
    """A run directory may come from a stranger, too: it is refused, and with trust it is measured."""
    run = tmp_path / "run"
    assert main(fit_command(make_checkpoint(), run, text_file, "--config=configs/solver/rtn.yaml")) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("bisup_lightning.calibrate.solvers.RTN", "stranger.Own"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = sha256(config)
    write_json(run / "manifest.json", manifest | {"sha256": digest_of(manifest["fingerprint"], manifest["files"])})
    before = traces(run)
    command = ["test", f"--run_dir={run}", "--accelerator=cpu"]
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "stranger.Own" in error
    assert not stranger()
    assert traces(run) == before
    assert main(["--trust_classes_from=stranger", *command]) == 0
    assert stranger()
