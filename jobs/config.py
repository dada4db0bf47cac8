"""The settings as asked: YAML, `--set` and flags -> JobConfig.

Unknown keys, wrong types and impossible values are refused, with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jobs import settings
from jobs.errors import ConfigError, file_beside, nearest
from jobs.sections import (
    JobConfig,
    Lora,
    ModelSection,
    OutputSection,
    RefinerSection,
    RuntimeSection,
    SamplingSection,
)
from jobs.settings import shown
from jobs.yaml_tree import read_yaml


def load(path: Path | None, overrides: Iterable[str] = ()) -> JobConfig:
    """Read a config file and apply `section.key=value` overrides.

    A relative checkpoint path in the file is taken from the file's folder, one in an
    override from the current folder.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type.
    """
    tree = _read_yaml(path) if path else {}
    where = str(path)
    for section, values in tree.items():
        _refuse_unknown(section, _section_types(), f"section in {where}")
        for key in values:
            _refuse_unknown(key, _fields(section), f"key in `{section}:` of {where}")
    if path:
        _from_folder(tree, path.parent)
    for text in overrides:
        section, key, value = _parse_override(text)
        tree.setdefault(section, {})[key] = value
    return from_dict(tree)


def _from_folder(tree: dict[str, dict[str, Any]], folder: Path) -> None:
    """Take the relative paths of a config file from its own folder."""
    for section in ("model", "refiner"):
        checkpoint = tree.get(section, {}).get("checkpoint")
        if checkpoint and isinstance(checkpoint, str):
            tree[section]["checkpoint"] = str(folder / checkpoint)
    loras = tree.get("model", {}).get("loras")
    for lora in loras if isinstance(loras, list) else ():
        if isinstance(lora, dict) and isinstance(lora.get("path"), str):
            lora["path"] = str(folder / lora["path"])


def from_dict(tree: Mapping[str, Mapping[str, Any]]) -> JobConfig:
    """Build the config from nested mappings, checking every name and type."""
    sections = {}
    for name, kind in _section_types().items():
        values = dict(tree.get(name) or {})
        for key in values:
            _refuse_unknown(key, _fields(name), f"key in `{name}`")
        if values.get("compile_cache") is False:
            values["compile_cache"] = "off"  # what YAML makes of it unquoted
        hints = typing.get_type_hints(kind)
        sections[name] = kind(
            **{k: _typed(v, hints[k], f"{name}.{k}") for k, v in values.items()}
        )
    config = JobConfig(**sections)
    _check_sampling(config.sampling)
    _check_ranges(config)
    return config


def _section_types() -> dict[str, Any]:
    return {
        "model": ModelSection,
        "sampling": SamplingSection,
        "refiner": RefinerSection,
        "runtime": RuntimeSection,
        "output": OutputSection,
    }


def _fields(section: str) -> list[str]:
    return [f.name for f in dataclasses.fields(_section_types()[section])]


def _refuse_unknown(name: str, known: Iterable[str], what: str) -> None:
    names = list(known)
    if name not in names:
        word = shown(name)
        raise ConfigError(f"unknown {what}: `{word}`", hint=nearest(word, names))


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = file_beside(path, (".yaml", ".yml"), "configs/ holds ready ones")
        raise ConfigError(f"can't read {path}: {error.strerror}", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `sampling:`")
    for section, values in tree.items():
        if values is None:
            tree[section] = {}
        elif not isinstance(values, dict):
            raise ConfigError(
                f"{path}: section `{shown(section)}` must hold `key: value` lines"
            )
    return tree


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(
            f"--set `{text}`: expected section.key=value",
            hint="for example `--set sampling.steps=8`",
        )
    _refuse_unknown(section, _section_types(), "section in --set")
    _refuse_unknown(key, _fields(section), f"key in --set {section}")
    try:
        return section, key, read_yaml(value)
    except ValueError:
        return section, key, value


def _typed(value: Any, hint: Any, name: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [t for t in typing.get_args(hint) if t is not type(None)]
        return None if value is None else _typed(value, options[0], name)
    if typing.get_origin(hint) is tuple:
        return _loras(value, name)
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is `{shown(value)}`; expected true or false")
        return value
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if value not in known:
            word = shown(value)
            raise ConfigError(f"{name} is `{word}`", hint=nearest(word, known))
        return value
    converted = _scalar(value, hint)
    if converted is None:
        word = {int: "a whole number", float: "a number", str: "text"}[hint]
        raise ConfigError(
            f"{name} is `{shown(value)}`; expected {word}",
            hint="YAML takes yes, no, on and off for truth values: quote them"
            if hint is str and isinstance(value, bool)
            else None,
        )
    return converted


def _loras(value: Any, name: str) -> tuple[Lora, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}: expected a list of `path` and `scale`")
    found = []
    for item in value:
        entry = dataclasses.asdict(item) if isinstance(item, Lora) else item
        if not isinstance(entry, dict) or "path" not in entry:
            raise ConfigError(f"{name}: every entry needs a `path`")
        for key in entry:
            _refuse_unknown(key, ("path", "scale"), f"key in {name}")
        path = _typed(entry["path"], str, f"{name}.path")
        scale = _typed(entry.get("scale", 1.0), float, f"{name}.scale")
        found.append(Lora(path=path, scale=scale))
    return tuple(found)


def _scalar(value: Any, hint: type) -> Any:
    if isinstance(value, bool):
        return None
    if hint is str:
        return shown(value) if isinstance(value, int | float) else _text(value)
    try:
        number = float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        return None
    if number != number or number in (float("inf"), float("-inf")):
        return None
    if hint is int:
        whole = isinstance(value, int) or number.is_integer()
        return int(value if isinstance(value, int) else number) if whole else None
    return number


def _text(value: Any) -> str | None:
    try:
        return settings.text(value)
    except ValueError:
        return None


def _check_sampling(section: SamplingSection) -> None:
    """Hold the job's settings to the same rules as a manifest row's."""
    for name, parse in settings.parsers().items():
        value = getattr(section, name, None)
        if value is None:
            continue
        try:
            parse(value)
        except ValueError as error:
            raise ConfigError(f"sampling.{name}: {error}") from None


_AT_LEAST_ONE = (
    ("runtime", "workers"),
    ("runtime", "batch_size"),
    ("runtime", "shard_batches"),
    ("runtime", "writer_threads"),
    ("runtime", "max_attempts"),
    ("output", "commit_every"),
)


def _check_ranges(config: JobConfig) -> None:
    for section, key in _AT_LEAST_ONE:
        value = getattr(getattr(config, section), key)
        if value is not None and not 1 <= value <= 65_536:
            raise ConfigError(f"{section}.{key} is `{value}`; it must be at least 1")
    limit = config.runtime.batch_timeout
    if limit is not None and limit <= 0:
        raise ConfigError(
            f"runtime.batch_timeout is `{limit:g}`; it must be above 0 seconds",
            hint="leave it out for no limit on the CPU and 30 minutes on Ascend",
        )
    tile = config.model.vae_tile
    if tile and not (256 <= tile <= 8192 and tile % 64 == 0):
        raise ConfigError(
            f"model.vae_tile is `{tile}`; it must be a multiple of 64 from 256 to 8192",
            hint="0 decodes pictures of any size at once",
        )
    for key, most in (("quality", 100), ("png_level", 9)):
        value = getattr(config.output, key)
        if not 0 <= value <= most:
            raise ConfigError(f"output.{key} is `{value}`; it must be 0 to {most}")
