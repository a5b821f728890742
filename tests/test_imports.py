"""The rule of docs/architecture.md, read from the source: who may import whom, and who may know what."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.inputs import ROOT

PACKAGE = "bisup_lightning"
LEAVES = {"errors", "files", "run_layout"}
BELOW_CALIBRATE = {"quant", "model", "transform", "data", "evaluate", "hub"}
MAY_IMPORT = {  # by part of the package; the leaves are open to all
    "quant": set(),
    "model": {"quant"},
    "transform": {"quant", "model"},
    "data": {"quant", "model"},
    "evaluate": {"quant", "model"},
    "hub": {"quant", "model"},
    "calibrate": BELOW_CALIBRATE,
    "parsers": BELOW_CALIBRATE | {"calibrate", "configuration"},
    "job_config": BELOW_CALIBRATE | {"calibrate", "configuration", "parsers"},
    "cli": BELOW_CALIBRATE | {"calibrate", "report", "configuration", "parsers", "job_config"},
    "configuration": set(),
    "callbacks": {"model", "calibrate"},
    "main": {"cli"},
    "__main__": {"cli"},
    "report": set(),
    "errors": set(),
    "files": set(),
    "run_layout": set(),
    "__init__": {"hub"},
}
HUGGING_FACE_NAMES = {
    "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "mlp", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "post_attention_layernorm", "embed_tokens", "lm_head", "rotary_emb",
}  # fmt: skip
FAMILY = ROOT / PACKAGE / "model" / "family.py"
MODULES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "main.py"])

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def part_of(path: Path) -> str:
    """`quant` for bisup_lightning/quant/affine.py, `cli` for bisup_lightning/cli.py, `callbacks`, or `main`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Full names of all modules that are imported anywhere, in functions and under TYPE_CHECKING too.

    `from a import b` counts as `a.b`, for b may be a module.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def parts_imported(tree: ast.AST, package: str) -> set[str]:
    """Parts of this project that are imported; the root (for its version) is none."""
    found = set()
    for name in imported_modules(tree, package):
        top, _, rest = name.partition(".")
        if top == PACKAGE and rest:
            found.add(rest.split(".")[0])
        elif top in ("callbacks", "main", "tests", "benchmarks"):
            found.add(top)
    return found


def hugging_face_names(tree: ast.AST) -> set[str]:
    """Names of a decoder layer's parts that appear as an attribute or within a string that is no docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words |= set(re.findall(r"\w+", node.value))
    return words & HUGGING_FACE_NAMES


def read(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


@each_module
def test_imports_only_what_lies_below(path):
    part = part_of(path)
    assert part in MAY_IMPORT, "a new part of the package: give it a place in docs/architecture.md and in this test"
    allowed = MAY_IMPORT[part] | (LEAVES - {part}) | {part}
    if part in LEAVES:
        allowed = {part}
    assert parts_imported(read(path), package_of(path)) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "quant").glob("*.py")), ids=lambda path: path.name)
def test_quant_knows_torch_alone(path):
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    if path.name == "hadamard.py":  # whose tables are data of a library
        allowed |= {"safetensors"}
    if path.name in ("kernels.py", "operators.py"):  # if it is installed
        allowed |= {"triton"}
    assert {name.split(".")[0] for name in imported_modules(read(path), package_of(path))} <= allowed


@each_module
def test_only_family_names_hugging_face_attributes(path):
    found = hugging_face_names(read(path))
    assert found == HUGGING_FACE_NAMES if path == FAMILY else not found


@each_module
def test_only_the_command_line_reads_configuration(path):
    names = imported_modules(read(path), package_of(path))
    if part_of(path) not in ("parsers", "job_config", "cli", "configuration"):
        assert not [name for name in names if name.split(".")[0] in ("jsonargparse", "yaml", "argparse")]
        assert not [name for name in names if name.startswith("lightning.pytorch.cli")]


def test_callbacks_are_named_by_configurations_alone():
    for path in MODULES:
        if part_of(path) != "callbacks":
            assert "callbacks" not in parts_imported(read(path), package_of(path))


# --- the reader itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "package", "parts"),
    [
        ("import bisup_lightning.model.kv as kv", "bisup_lightning.quant", {"model"}),
        ("from bisup_lightning import model", "bisup_lightning.quant", {"model"}),
        ("from ..hub import save", "bisup_lightning.data", {"hub"}),
        ("from .. import hub", "bisup_lightning.data", {"hub"}),
        ("from .corpus import x", "bisup_lightning.data", {"data"}),
        ("def f():\n    from bisup_lightning.cli import main", "bisup_lightning.data", {"cli"}),
        ("if TYPE_CHECKING:\n    from callbacks.fuse import Fuse", "bisup_lightning.data", {"callbacks"}),
        ("import bisup_lightning, torch.nn", "bisup_lightning.data", set()),
    ],
)
def test_reader_finds_every_form_of_import(source, package, parts):
    assert parts_imported(ast.parse(source), package) == parts


def test_reader_finds_names_and_skips_docstrings():
    source = '"""Of q_proj."""\nx = layer.self_attn\ny = getattr(layer, "mlp")\nz = f"{p}.input_layernorm.weight"'
    assert hugging_face_names(ast.parse(source)) == {"self_attn", "mlp", "input_layernorm"}
    assert hugging_face_names(ast.parse("mlp_input = 'mlp_input'")) == set()
