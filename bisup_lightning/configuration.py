"""How configurations are read: YAML files that compose, from people whom one may not know, and errors for people."""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from bisup_lightning.errors import UserError

MOST_NODES = 100_000  # of a configuration, aliases written out
TRUST = "--trust_classes_from"  # never read from a file: who writes a configuration does not decide whom to trust
TRUSTED = ["bisup_lightning", "callbacks", "lightning", "pytorch_lightning"]
UNKNOWN = re.compile(  # how the library names keys that it does not know
    r"(?:Group|[Oo]ption) '([^']+)'(?! is not accepted before)|unrecognized arguments: -*([^\s=]+)"
)
IN_PLAIN_WORDS = {  # what the library says, for those who don't know it
    r"Importing '(([^']+)\.[^'.]+)' is not allowed.*": rf"\1 is not trusted; if you do, add {TRUST} \2",
    r"Expected a dot import path string: (\S+)": r"\1 is no known class; write its path, such as package.module.Class",
    r"(?:an? )?<class '([^']+)'>|typing\.(?=Literal)": r"\1",
}


def new_parser(description: str) -> LightningArgumentParser:
    """A parser that raises instead of exiting, and reads configurations that build upon each other."""
    parser = Parser(prog="main.py", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file; several compose, the last one wins.")
    return parser


class Parser(LightningArgumentParser):
    """Tells more of a mistake than the library's own; the library makes the parsers of classes in it likewise."""

    def validate(self, namespace: Any, *arguments: Any, **settings: Any) -> None:
        """See that keys are known and values, also nulls, of their types.

        Raises:
            KeyError: If a key is not.
            TypeError: If a value is not.
        """
        needed = [action.dest for action in self._actions if action.required]
        missing = any(namespace.get(key) is None for key in needed)  # it is null, too, and others tell it better
        skip_unset = missing or self._subcommands_action is not None  # whose parsers see to their own
        super().validate(namespace, *arguments, **{**settings, "skip_unset": skip_unset})
        for group in self.groups or ():
            if namespace.get(group, group) is None and self.get_defaults().get(group) is not None:
                raise TypeError(f'Parser key "{group}":\nmust not be null; leave it out for its defaults')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the arguments; beside a key that is not known, name the nearest one that is.

        Raises:
            ArgumentError: With the message.
        """
        if unknown := UNKNOWN.findall(message):
            key = ".".join(group or argument for group, argument in unknown)
            nearest = get_close_matches(key, (action.dest for action in self._actions), n=1, cutoff=0.75)
            message = f"there is no key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
            ex = None  # which says less
        super().error(message, ex)


class ConfigFile(ActionConfigFile):
    """An option that names a configuration's file, which may come from a stranger."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Add what it holds.

        Raises:
            UserError: If it is no configuration, would be endless, or holds a key or a value that can't be.
        """
        check_file(values)
        try:
            super().__call__(parser, cfg, values, option_string)
            try:
                parser.validate(cfg, skip_required=True)  # here already, where it is known which file a key is from
            except KeyError as error:
                parser.error(str(error))
        except (ArgumentError, TypeError) as error:
            raise UserError(f"config: {values}: {one_line(error)}") from error


def check_file(path: str | Path) -> None:
    """Refuse a file that is no text or no YAML of keys and values, names a key twice, or would be endless.

    Raises:
        UserError: Naming it.
    """
    if not Path(path).is_file():
        return  # the parser says so
    try:
        with Path(path).open(encoding="utf-8") as file:  # whose name an error tells
            root = yaml.compose(file)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"config: {path} holds no keys with values, such as seed: 0")
        if _nodes(root, {}) > MOST_NODES:
            raise UserError(f"config: {path} holds more than {MOST_NODES} values")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config: {path} can't be read: {error}") from error


def _nodes(node: Any, known: dict[int, int]) -> int:
    """How many there are with all below, aliases written out, as far as they are not known.

    Raises:
        ValueError: If one of them names a key twice.
    """
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise ValueError(f"{twice} is given more than once, from line {node.start_mark.line + 1} on")
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
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument(TRUST, action="append", default=[], metavar="MODULE")
    try:
        known, others = options.parse_known_args(arguments)
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=TRUSTED + known.trust_classes_from)
    except (ArgumentError, ValueError) as error:
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
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return str(error)


def one_line(error: Exception) -> str:
    """The error's message for a person."""
    message = str(error)
    if keys := re.findall(r'Parser key "([^"]+)"', message):
        given = re.search(r"Given value: (?!Namespace|NestedArg|[\[{])(.+)", message)
        reason = re.sub(r'^Parser key "[^"]+":\s*', "", root_message(error)).partition("\n")[0]
        message = f"{'.'.join(dict.fromkeys(keys))}: {reason}"
        message += f" (given: {given[1]})" if given and given[1] not in message else ""
        for pattern, words in IN_PLAIN_WORDS.items():
            message = re.sub(pattern, words, message)
    return " ".join(message.split())
