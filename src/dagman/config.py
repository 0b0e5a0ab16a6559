"""Frozen dataclasses to and from nested dictionaries, YAML and dotted flags, with errors that name the field.

A config is a frozen, keyword-only dataclass whose fields are scalars, tuples of scalars, `Literal`s, optional values or
other configs. Where a field may hold one of several configs, their field `kind` tells them apart; without it the first
is meant. Impossible combinations raise `DagmanError` in `__post_init__`. A field with the metadata `FREE` changes
nothing that is computed.
"""

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dagman.errors import DagmanError

Config = TypeVar("Config")
UNKNOWN = "is not known"
FREE = {"free": True}
"""Metadata of a field of which what goes on may have another value."""
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_ITEMS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "words"}
_COUNTS = {0: "any", 2: "two", 3: "three", 4: "four"}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), ready for YAML and JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def deciding(config: Any, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Nested dictionary of plain values without the fields that are `FREE`.

    Args:
        config: Says which fields these are.
        values: Of such a config, as they were written; its own where None.
    """
    given = to_dict(config) if values is None else values
    free = {field.name for field in dataclasses.fields(config) if field.metadata.get("free")}
    kept = {}
    for name, value in given.items():
        part = getattr(config, name, None)
        if name not in free:
            nested = dataclasses.is_dataclass(part) and isinstance(value, Mapping)
            kept[name] = deciding(part, value) if nested else value
    return kept


def from_dict(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a config from a nested mapping; fields that are absent keep their defaults.

    Raises:
        DagmanError: `E-CONFIG` for an unknown field (with the nearest name) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        path = _path(where, name)
        if name not in hints:
            raise unknown("CONFIG", path, [_path(where, known) for known in hints])
        arguments[name] = convert(hints[name], value, path)
    return kind(**arguments)


def _path(where: str, name: str) -> str:
    """A field below `where`, spelt with dashes on a command line, where names start with `--`."""
    return f"{where}{name.replace('_', '-') if where.startswith('--') else name}"


def unknown(code: str, word: str, known: list[str]) -> DagmanError:
    """The error for a word that is not one of `known`, with the nearest one."""
    near = difflib.get_close_matches(word, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    return DagmanError(code, word, UNKNOWN, advice)


def convert(hint: Any, value: Any, path: str) -> Any:
    """A plain value as what a type hint says.

    Args:
        hint: Of a config's field.
        value: From YAML, JSON or a flag.
        path: The field's name in errors.

    Raises:
        DagmanError: `E-CONFIG` as in `from_dict`, and for a `kind` that none of the hint's configs has.
    """
    arguments = typing.get_args(hint)
    if _is_union(hint):
        if type(None) in arguments and str(value).lower() in ("none", "null"):
            return None
        first = next(argument for argument in arguments if argument is not type(None))
        return convert(_config_meant(hint, value, path, first), value, path)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type[Any], hint), value, f"{path}.")
    if typing.get_origin(hint) is tuple:
        converted = _items(arguments, value, path)
    elif typing.get_origin(hint) is Literal:
        converted = next((choice for choice in arguments if str(choice) == str(value)), None)
    else:
        converted = _scalar(hint, value)
    if converted is None:
        raise DagmanError("CONFIG", path, f"cannot be {value!r}", f"give {described(hint, value)}")
    return converted


def described(hint: Any, value: Any = None) -> str:
    """What a type hint asks for, in words; of one whole number where several are meant, these.

    Args:
        hint: Of a config's field, or of a flag.
        value: What was given instead.
    """
    arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if _is_union(hint):
        return " or ".join(dict.fromkeys(map(described, arguments)))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        count = 0 if arguments[1:] == [...] else len(arguments)
        said = f"{_COUNTS.get(count, count)} {_ITEMS.get(arguments[0], 'values')}".removeprefix("any ")
        one = str(value) if arguments[0] is int and _scalar(int, value) is not None else ""
        return f"{said}, such as {','.join([one] * count)}" if one and count else f"{said} with commas between them"
    if dataclasses.is_dataclass(hint):
        return "its settings one by one"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _config_meant(hint: Any, value: Any, path: str, default: Any) -> Any:
    """Which of the configs of a union the `kind` of a mapping names; `default` without one."""
    configs = {arm.kind: arm for arm in typing.get_args(hint) if hasattr(arm, "kind")} if _is_union(hint) else {}
    if len(configs) < 2 or not isinstance(value, Mapping) or "kind" not in value:
        return default
    kind = str(value["kind"])
    if kind not in configs:
        raise DagmanError("CONFIG", f"{path}.kind", f"cannot be {kind!r}", f"give one of {', '.join(configs)}")
    return configs[kind]


def _items(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...] | None:
    """`value` as a tuple (a list, or text such as `2,2,8,2`); None where the length is wrong or it is no sequence."""
    items = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return None
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(items)
    if len(kinds) != len(items):
        return None
    return tuple(convert(kind, item, path) for kind, item in zip(kinds, items, strict=True))


def _scalar(kind: Any, value: Any) -> Any:
    """`value` as bool, int, float or str; None where it is none of that kind."""
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        return words.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    return _whole(value) if kind is int else _finite(value)


def _whole(value: Any) -> int | None:
    """A whole number digit for digit, which a float would round above 2^53; or one written as `1e3` or `2.0`."""
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = _finite(value)
        return int(number) if number is not None and number.is_integer() else None


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def override(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """A copy of `config` with fields replaced, by nested mapping or dotted names (`{"method.losses.ampd": 0}`).

    Another `kind` of a config starts from the defaults of that kind.

    Raises:
        DagmanError: `E-CONFIG` as in `convert`.
    """
    nested: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = str(name).replace("-", "_").partition(".")
        if rest:
            _below(nested, head, where)[rest] = value
        elif isinstance(value, Mapping):
            _below(nested, head, where).update(value)
        else:
            nested[head] = value
    hints = typing.get_type_hints(type(config))
    changes = {}
    for name, value in nested.items():
        path = _path(where, name)
        if name not in hints:
            raise unknown("CONFIG", path, [_path(where, known) for known in hints])
        current = getattr(config, name)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            meant = _config_meant(hints[name], value, path, type(current))
            changes[name] = override(current if isinstance(current, meant) else meant(), value, f"{path}.")
        else:
            changes[name] = convert(hints[name], value, path)
    return dataclasses.replace(typing.cast(Any, config), **changes) if changes else config


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        DagmanError: `E-CONFIG` when the file is missing or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DagmanError(
            "CONFIG", path, f"cannot be read ({type(error).__name__}{line})", "give a YAML file of settings"
        ) from None
    if not isinstance(values, dict):
        raise DagmanError("CONFIG", path, "holds no settings", "write lines such as `optimisation: {steps: 1000}`")
    return values


def to_yaml(config: Any) -> str:
    """The config as YAML text, fields in the order they are declared."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False)
    return text


def _below(nested: dict[str, Any], head: str, where: str) -> dict[str, Any]:
    below = nested.setdefault(head, {})
    if not isinstance(below, dict):
        raise DagmanError("CONFIG", f"{where}{head}", f"is set to {below!r} and has a field set too", "set one of both")
    return below


def difference(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Lines `field: old -> new` for every value that differs between two nested dictionaries."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{where}{name}.")
        elif before != after:
            lines.append(f"{where}{name}: {before} -> {after}")
    return lines
