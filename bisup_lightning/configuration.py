"""How configurations are read: YAML files that compose, from people whom one may not know, and errors for people."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from bisup_lightning.errors import UserError

MOST_NODES = 100_000  # of a configuration, aliases written out
TRUST = "--trust_classes_from"  # never read from a file: who writes a configuration does not decide whom to trust
TRUSTED = ["bisup_lightning", "callbacks", "lightning", "pytorch_lightning"]


def new_parser(description: str) -> LightningArgumentParser:
    """A parser that raises instead of exiting, and reads configurations that build upon each other."""
    parser = LightningArgumentParser(prog="main.py", description=description, exit_on_error=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file; several compose, the last one wins.")
    return parser


class ConfigFile(ActionConfigFile):
    """An option that names a configuration's file, which may come from a stranger."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Add what it holds.

        Raises:
            UserError: If it is no text, or would be endless.
        """
        check_file(values)
        super().__call__(parser, cfg, values, option_string)


def check_file(path: str | Path) -> None:
    """Refuse a file that is no text, is nested without end, or grows without measure once its aliases are written out.

    Raises:
        UserError: Naming it.
    """
    try:
        if Path(path).is_file() and _nodes(yaml.compose(Path(path).read_text(encoding="utf-8")), {}) > MOST_NODES:
            raise UserError(f"config: {path} holds more than {MOST_NODES} values")
    except yaml.YAMLError:
        pass  # the parser tells it better
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"config: {path} can't be read: {error}") from error


def _nodes(node: Any, known: dict[int, int]) -> int:
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        known[id(node)] = 1 + sum(_nodes(child, known) for child in children)
    return known[id(node)]


def trust(arguments: Sequence[str]) -> list[str]:
    """Let values name classes of this project and of Lightning alone, and of the modules given for `TRUST`.

    Naming a class imports its module, and importing runs what is in it.

    Returns:
        The other arguments.

    Raises:
        UserError: If no module is named, or none that may be.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument(TRUST, action="append", default=[], metavar="MODULE")
    try:
        known, others = options.parse_known_args(arguments)
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=TRUSTED + known.trust_classes_from)
    except (SystemExit, ValueError) as error:
        raise UserError(f"{TRUST}: name a module, such as my_package.solvers") from error
    return others


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}  # as JSON gives it back
    leaves: dict[str, Any] = {}
    for name, child in value.items():
        leaves |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return leaves


def root_message(error: BaseException) -> str:
    """What went wrong first: the parser wraps it in an account of all that it tried."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error)


def one_line(error: Exception) -> str:
    """The error's message for a person."""
    message = str(error)
    if isinstance(error, ArgumentError) and "Union subtypes" in message:
        key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        given = re.search(r"Given value: (?!Namespace|NestedArg)(.+)", message)
        message = f"{key}: {root_message(error)}" + (f" (given: {given[1]})" if given else "")
    return " ".join(message.split())
