"""A dataclass filled from a YAML file and from the command line, which wins; every mistake is one clear line.

The settings of the file become flags that stand before the real ones, so that both take one typed path and the last
one wins. It knows nothing of any particular dataclass.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from flow_data.shipped_files import find_config

SWITCH_VALUES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class YamlMapping(dict):
    """A mapping; on the command line it is YAML text in quotes."""

    def __init__(self, value: Any = ()):
        loaded = parse_yaml(value) if isinstance(value, str) else dict(value)
        if not isinstance(loaded, dict):
            raise argparse.ArgumentTypeError(f"must be a mapping like '{{name: value}}'; got {value!r}")
        super().__init__(loaded)


class YamlValue:
    """Any value of YAML; on the command line it is its text."""

    def __new__(cls, text: str) -> Any:
        return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text on the command line."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {error}") from error


def parse_switch(text: str) -> bool:
    """The value of a switch that is given one, as in `--flip false`."""
    if text.lower() not in SWITCH_VALUES:
        raise argparse.ArgumentTypeError(f"must be true or false; got {text!r}")
    return SWITCH_VALUES[text.lower()]


def flag_name(word: str) -> str:
    """The name of a flag, `hub_token` of `--hub_token`, `--hub-token` and `--hub-token=VALUE`; "" for other words.

    A text in quotes that begins with a flag is another word.
    """
    name = word.partition("=")[0]
    return name[2:].replace("-", "_") if name.startswith("--") and " " not in name else ""


def find_flag(argv: Sequence[str], name: str) -> set[int]:
    """Indices of the words of a command line that give a flag of one value: of the flag, and of a value after it."""
    found = {index for index, word in enumerate(argv) if flag_name(word) == name}
    return found | {index + 1 for index in found if "=" not in argv[index]}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values; what is done without a value stands in the help of its flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_value = action.default is not None and action.default is not dataclasses.MISSING
        return super()._get_help_string(action) if has_value else action.help


class FlagParser(argparse.ArgumentParser):
    """Flags of a dataclass: no abbreviations, `--no_NAME` for every switch, errors in one line.

    Args:
        dataclass_type: Each field has a flag, by its type: `bool`, `list[...]`, `Literal[...]`, `YamlMapping`, or what
            its text is given to. The metadata of a field has its `help`. A list whose default is empty may be empty.
        prog: Name of the program.
    """

    def __init__(self, dataclass_type: Any, prog: str):
        usage = "%(prog)s --config configs/NAME.yaml [--flag value ...]     (--help lists all flags)"
        super().__init__(prog=prog, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.dataclass_type = dataclass_type
        self.add_argument("--config", help="YAML file of settings; flags win over it")
        type_hints = get_type_hints(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            self._add_field(field, type_hints[field.name])

    def _add_field(self, field: dataclasses.Field, type_hint: Any) -> None:
        names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        options: dict[str, Any] = {"help": field.metadata["help"], "default": _default_of(field)}
        options["required"] = options["default"] is dataclasses.MISSING
        kind = next(kind for kind in (*get_args(type_hint), type_hint) if kind is not type(None))
        if type_hint is bool:
            options |= {"type": parse_switch, "nargs": "?", "const": True}
            no = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
            self.add_argument(*names, **options)
            self.add_argument(*dict.fromkeys(no), dest=field.name, action="store_false", default=argparse.SUPPRESS)
            return
        if get_origin(type_hint) is list:
            options |= {"type": kind, "nargs": "*" if options["default"] == [] else "+"}
        elif (choices := _choices_of(type_hint)) is not None:
            options["choices"] = choices
        else:
            options["type"] = type_hint if get_origin(type_hint) is None and not get_args(type_hint) else kind
        self.add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, argv: Sequence[str], secret: str) -> Any:
        """Read `--config FILE` and flags.

        Args:
            argv: The command line, without the program. FILE may be the name of a shipped recipe.
            secret: The name of a flag whose value is never shown.

        Returns:
            The dataclass.

        Raises:
            SystemExit: Something is wrong; one line that names key and value has been printed.
        """
        config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        config_parser.error = self.error  # type: ignore[method-assign]
        config_parser.add_argument("--config")
        path = config_parser.parse_known_args(argv)[0].config
        arguments = list(argv)
        try:
            if path is not None:
                arguments = to_flags(read_yaml(find_config(path)), self.dataclass_type, path) + arguments
            # argparse stops at the first missing or malformed flag; a misspelt one explains more, so it goes first.
            hidden = find_flag(arguments, secret)
            flags = [word for index, word in enumerate(arguments) if index not in hidden]
            for flag in (word for word in flags if word.startswith("--")):
                if flag.partition("=")[0] not in self._option_string_actions:
                    raise ValueError(f"unknown flag {flag}{nearest(flag, list(self._option_string_actions))}")
            values, rest = self.parse_known_args(arguments)
            if rest:
                raise ValueError(f"{rest[0]!r} belongs to no flag")
            settings = {name: value for name, value in vars(values).items() if name != "config"}
            return self.dataclass_type(**settings)
        except (ValueError, OSError) as error:
            self.error(str(error))


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _choices_of(type_hint: Any) -> tuple | None:
    """The values of a `Literal`, which may be in a union with None; None for other types."""
    for part in (type_hint, *get_args(type_hint)):
        if get_origin(part) is Literal:
            return get_args(part)
    return None


def nearest(name: str, names: Sequence[str]) -> str:
    """A hint at the right name, to append to an error."""
    matches = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings name each key once; by itself the last one wins, and the first is silently lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; errors name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def check_keys(settings: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    """Refuse what is no mapping, or has unknown keys; `where` begins the message."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must hold `key: value` lines; got {settings!r}")
    for key in settings:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}{nearest(str(key), known)}")
    return settings


def to_flags(settings: Any, dataclass_type: Any, where: str) -> list[str]:
    """Settings as flags of a dataclass; those that are None are left out.

    Args:
        settings: A mapping, from a YAML file.
        dataclass_type: Of the `FlagParser`.
        where: The file or the place in it, for messages.

    Raises:
        ValueError: It is no mapping, or a key or the type of a value is wrong.
    """
    type_hints = get_type_hints(dataclass_type)
    flags: list[str] = []
    for key, value in check_keys(settings, list(type_hints), where).items():
        type_hint = type_hints[key]
        if value is None:
            continue
        if value is False and "no" in (_choices_of(type_hint) or ()):
            value = "no"  # a bare `no` is False in YAML 1.1
        if type_hint is bool and not isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be true or false; got {value!r}")
        if type_hint is not bool and isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be a value and not a switch; got {value}")
        if isinstance(value, list) and get_origin(type_hint) is not list:
            raise ValueError(f"{where}: {key} must be one value; got {value}")
        if value == [] and _default_of(dataclass_type.__dataclass_fields__[key]) != []:
            raise ValueError(f"{where}: {key} must not be an empty list; leave it out for its default")
        if isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, dict):
            flags += [f"--{key}", yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()]
        else:
            flags += [f"--{key}", *map(_to_text, value if isinstance(value, list) else [value])]
    return flags


def _to_text(value: Any) -> str:
    # argparse takes -0.2 for a value but -1e-05 for a flag
    return np.format_float_positional(value, trim="0") if isinstance(value, float) else str(value)
