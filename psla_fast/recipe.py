"""Recipes: defaults < recipe.toml … < flags -> one frozen config. A recipe is flags written down in TOML."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

Config = TypeVar("Config")


def packaged_recipes() -> list[str]:
    """Name the recipes that come with the package, for instance `fsd50k`."""
    folder = resources.files("psla_fast") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe by path, or a packaged one by its bare name, as `{"section.key": value}`.

    Raises ValueError where there is none, with the closest name, or where it isn't TOML.
    """
    if Path(name).is_file():
        content = Path(name).read_bytes()
    elif name in packaged_recipes():
        content = (resources.files("psla_fast") / "recipes" / f"{name}.toml").read_bytes()
    else:
        close = difflib.get_close_matches(Path(name).stem, packaged_recipes(), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Packaged are: {', '.join(packaged_recipes())}."
        raise ValueError(f"recipe {name!r} not found. {hint}")
    try:
        return _flatten(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name} is not TOML: {error}.") from error


def parse_recipes(kind: type[Config], arguments: Sequence[str], prog: str) -> Config:
    """Parse `RECIPE.toml… [--flag value]…`; the later wins.

    A flag of a yes or no is yes without a value. Raises ValueError with the closest known name for an unknown
    key or flag. `--help` prints and exits with 0.
    """
    recipes = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        recipes.append(argument)
    flags = list(arguments[len(recipes) :])
    fields = _fields(kind)
    words: list[str] = []
    for recipe in recipes:
        for key, value in read_recipe(recipe).items():
            if key not in fields:
                raise ValueError(f"recipe {recipe}: unknown key {key!r}. {_closest(key, fields)}")
            words += _as_flag(key, value)
    for flag, value in itertools.pairwise([*flags, "--"]):
        name = flag.split("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name not in fields and name != "help":
            suggestion = _closest(name, fields).replace("_", "-")
            raise ValueError(f"unknown flag {flag.split('=')[0]}. {suggestion}")
        alone = fields.get(name) is bool and flag.startswith("--") and "=" not in flag
        words += [flag, "True"] if alone and value.startswith("--") else [flag]
    return parse_flags(kind, words, prog, (tyro.conf.FlagConversionOff,))


def parse_flags(
    kind: type[Config], arguments: Sequence[str], prog: str, markers: tuple[Any, ...] = ()
) -> Config:
    """Parse flags into a dataclass; raises ValueError of one line where tyro would print a box."""
    printed, arguments = io.StringIO(), _capitalise(arguments, _written_out(kind, markers))
    try:
        if {"-h", "--help"} & set(arguments):
            return tyro.cli(kind, args=["--help"], prog=prog, config=markers)
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(kind, args=arguments, prog=prog, config=markers)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(f"{_one_line(printed.getvalue())} See {prog} --help.") from None


def resolved(config: Any) -> dict[str, Any]:
    """Turn a config into plain nested values that TOML can hold and `read_recipe` reads back."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = resolved(value)
        elif isinstance(value, Path):
            plain[field.name] = str(value)
        else:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def flat_config(config: Any) -> dict[str, Any]:
    """Turn a config into `{"section.key": value}`, to compare two."""
    return _flatten(resolved(config))


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key.replace('-', '_')}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _fields(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config class as `section.key`, with its type."""
    names: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        nested = dataclasses.is_dataclass(inner)
        names |= _fields(inner, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": inner}
    return names


def _written_out(kind: Any, markers: tuple[Any, ...]) -> set[str]:
    """Name the fields of a yes or no that are given as --flag True or --flag False."""
    if tyro.conf.FlagConversionOff in markers:
        return {name for name, inner in _fields(kind).items() if inner is bool}
    hints = get_type_hints(kind, include_extras=True)
    off = {name for name, hint in hints.items() if tyro.conf.FlagConversionOff in _metadata(hint)}
    return {name for name in off if get_type_hints(kind)[name] is bool}


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _capitalise(words: Sequence[str], fields: set[str]) -> list[str]:
    """Write a yes or no as Python does, which tyro wants: `--strict false` becomes `--strict False`."""
    known = {"true": "True", "false": "False"}
    written, flag = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = name.removeprefix("--").replace("-", "_")
        if flag in fields:
            word = name + equals + known.get(value, value) if equals else known.get(word, word)
        written.append(word)
    return written


def _closest(name: str, known: Iterable[str]) -> str:
    last = [field for field in known if field.split(".")[-1] == name.split(".")[-1]]
    close = last or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"Did you mean {close[0]!r}?" if close else "See --help for all."


def _as_flag(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def _one_line(box: str) -> str:
    """Take the message out of tyro's box: what stands between its title and its next rule."""
    lines = [line.strip(" │|╭╮╰╯") for line in box.splitlines()[1:]]
    sections = re.split(r"(?m)^[-─]*$", "\n".join(lines))
    message = next((" ".join(section.split()) for section in sections if section.strip()), "")
    return (message.rstrip(".:") or "the arguments can't be parsed") + "."
