"""Where the configuration comes from: a flag goes before the environment, then a file, then the default.

Everything is merged first and validated then, whole, so that one start names every problem. Secrets come from files of
their own: neither the environment nor the configuration file has a place for one.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from orcd_jax.config import ConfigError, Given, WorkerConfig
from orcd_jax.telemetry.log import neutral

MAX_FILE_BYTES = 65_536
_MAX_UNKNOWN_KEYS = 20  # named one by one
_PREFIX = "WORKER_"
_PUBLIC_NAMES = {"bind_address": "WORKER_BIND_ADDR"}  # besides the one made from the field's


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was found.

    Attributes:
      name: the environment variable's or the file's; empty for a flag and a default.
    """

    kind: Literal["flag", "environment", "file", "default"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class Configured:
    """A valid configuration, and where each of its fields came from."""

    config: WorkerConfig
    origins: Mapping[str, Origin]


def configure(flags: Mapping[str, Given], environment: Mapping[str, str], file: Path | None) -> Configured:
    """Merges the sources and validates the whole.

    Args:
      flags: field name to what its flag was given.
      environment: the process's.
      file: of ``--config``, if there is one.

    Raises:
      ConfigError: every problem of every source. When the file cannot be read, what it may hold is not asked for.
    """
    problems = [*_secrets_in(environment), *_contradictions_in(environment)]
    in_file: dict[str, Given] = {}
    if file is not None:
        try:
            in_file, refused = _known_values(file.name, _read(file))
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        problems += refused
    values: dict[str, Given] = {}
    origins = dict.fromkeys(WorkerConfig.model_fields, Origin("default"))
    for name, value in in_file.items():
        values[name], origins[name] = value, Origin("file", neutral(file.name if file else "", 80))
    for name in WorkerConfig.model_fields:
        for variable in _variables(name):
            if text := environment.get(variable):
                values[name], origins[name] = text, Origin("environment", variable)
    for name, value in flags.items():
        values[name], origins[name] = value, Origin("flag")
    try:
        config = WorkerConfig.from_flags(values, {name: origin.name for name, origin in origins.items() if origin.name})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return Configured(config, origins)


def likely(name: str) -> str:
    """A hint at the flag that was probably meant."""
    near = difflib.get_close_matches(name[:80].replace("-", "_").lower(), list(WorkerConfig.model_fields), n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"


# -- the environment ---------------------------------------------------------------------------------------------------


def _variables(name: str) -> tuple[str, ...]:
    own = f"{_PREFIX}{name.upper()}"
    return (own, _PUBLIC_NAMES[name]) if name in _PUBLIC_NAMES else (own,)


def _secrets_in(environment: Mapping[str, str]) -> Iterator[str]:
    for name in WorkerConfig.model_fields:
        if name.endswith(("_token_file", "_key_file")):
            variable = f"{_PREFIX}{name.removesuffix('_file').upper()}"
            if environment.get(variable):
                yield (
                    f"{variable}: a secret is not taken from the environment, which other programs see: put it into a "
                    f"file with mode 0600 and give {variable}_FILE"
                )


def _contradictions_in(environment: Mapping[str, str]) -> Iterator[str]:
    for name in _PUBLIC_NAMES:
        given = {variable: text for variable in _variables(name) if (text := environment.get(variable))}
        if len(set(given.values())) > 1:
            yield f"{' and '.join(given)} say different things: set one of them"


# -- the file ----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, object]:
    """The keys and values of a JSON or TOML file, whatever they are.

    Raises:
      ConfigError: it cannot be read, is too large, or is not what its suffix says.
    """
    if file.suffix not in (".json", ".toml"):
        _refuse(file, "its name must end with .json or .toml, which says what it is")
    data = _bytes_of(file)
    try:
        text = data.decode()
        if file.suffix == ".toml":
            return tomllib.loads(text)
        parsed = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError:
        _refuse(file, "it is not UTF-8 text")
    except RecursionError:
        _refuse(file, "it is nested too deeply; its keys are flag names, its values plain")
    except ValueError as error:  # both parsers' own errors are
        _refuse(file, neutral(str(error), 120))
    if not isinstance(parsed, dict):
        _refuse(file, "it must be one JSON object, whose keys are flag names")
    return parsed


def _bytes_of(file: Path) -> bytes:
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe would hold the start forever
    except OSError as error:
        _refuse(file, f"it cannot be read ({error.strerror})")
    with os.fdopen(opened, "rb") as stream:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            _refuse(file, "it is not a regular file")
        if status.st_mode & stat.S_IWOTH:
            _refuse(file, "anyone can write it: run `chmod o-w` on it")
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        _refuse(file, f"it has {status.st_size} bytes; the limit is {MAX_FILE_BYTES}")
    return data


def _known_values(file: str, found: Mapping[str, object]) -> tuple[dict[str, Given], list[str]]:
    """The values that flags can take, and what is wrong with the rest."""
    values: dict[str, Given] = {}
    problems = []
    unknown = [key for key in found if key not in WorkerConfig.model_fields]
    for key in itertools.islice(unknown, _MAX_UNKNOWN_KEYS):
        problems.append(f"--config: {neutral(file, 80)}: there is no flag {neutral(key, 40)}{likely(key)}")
    if len(unknown) > _MAX_UNKNOWN_KEYS:
        problems.append(f"--config: {neutral(file, 80)}: and {len(unknown) - _MAX_UNKNOWN_KEYS} more that are no flags")
    for key, value in found.items():
        if key in unknown:
            continue
        # An int may have as many digits as the file has room for, and showing it would take long.
        if not isinstance(value, str | bool | int | float) or (isinstance(value, int) and value.bit_length() > 64):
            problems.append(f"--{key}: what {neutral(file, 80)} gives is not text, a truth value or a 64-bit number")
        else:
            values[key] = value
    return values, problems


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(file: Path, problem: str) -> NoReturn:
    raise ConfigError([f"--config: {neutral(file.name, 80)}: {problem}"])
