"""The worker's command line: absl flags made from the fields of :class:`WorkerConfig`, and what they answer at once."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from orcd_jax import __version__
from orcd_jax.config import ConfigError, Given, WorkerConfig, flag_of
from orcd_jax.config_sources import Configured, configure, likely
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.log import neutral

_USAGE = (
    "orcd-worker: one process, one GPU, one language model, streamed over gRPC.\n\n"
    "usage: orcd-worker --worker_id=ID --pool_id=ID --model_path=DIR --rpc_port=PORT --api_token_file=FILE\n"
    "                   (--readiness_callback_url=URL | --standalone) [flags]\n"
    "A flag goes before the environment variable WORKER_<FLAG>, that before the file of --config.\n"
)
_HIDDEN = "(not shown)"
# What is no part of the configuration: name, how it is written, meaning.
_ANSWERS = (
    ("config", "--config=FILE", "JSON or TOML file whose keys are flag names; its suffix says which."),
    ("print_config", "--print_config", "Show each value and where it came from, then exit; --print_config=json too."),
    ("help", "--help", "Show this help."),
    ("version", "--version", "Show the version."),
)


def parse(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> WorkerConfig | None:
    """The configuration that flags, environment and file give; None when a question was asked and answered instead.

    Args:
      argv: program name, then flags.
      environment: the process's, where it counts.

    Raises:
      ConfigError: a flag is unknown, or a value is missing or not allowed. All problems at once.
    """
    given = _define_flags()
    try:
        rest = given(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise ConfigError([f"--{neutral(name, 40)}: there is no such flag{likely(name)}"]) from None
    except flags.Error as error:
        raise ConfigError([f"{neutral(str(error), 160)}; see --help"]) from None
    if given["help"].value:
        print(help_text())  # noqa: T201 - the answer
        return None
    if given["version"].value:
        print(f"orcd-worker {__version__}")  # noqa: T201 - the answer
        return None
    if rest:
        raise ConfigError([f"{ascii(rest[0])[:40]}: only flags are taken; write --flag=value"])
    style = given["print_config"].value
    if style not in (False, True, "json"):
        raise ConfigError([f"--print_config: {ascii(style)[:40]} is not allowed; it must be alone, or json"])
    values: dict[str, Given] = {}
    for name in WorkerConfig.model_fields:
        value: str | bool | None = given[name].value
        if value is not None:
            values[name] = value
    file = given["config"].value
    configured = configure(values, environment or {}, None if file is None else Path(file))
    if style:
        print(config_json(configured) if style == "json" else config_table(configured))  # noqa: T201 - the answer
        return None
    return configured.config


def config_table(configured: Configured) -> str:
    """What ``--print_config`` prints: a line for each value, with where it came from."""
    rows = [("flag", "value", "from")]
    for name, origin in configured.origins.items():
        value = getattr(configured.config, name)
        shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        hidden = not flag_of(name).shown and value
        rows.append((name, _HIDDEN if hidden else neutral(shown, 120) or '""', str(origin)))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:{first}}  {value:{second}}  {origin}" for name, value, origin in rows)


def config_json(configured: Configured) -> str:
    """What ``--print_config=json`` prints: for each flag its ``value``, unless hidden, and ``from``."""
    values = configured.config.model_dump(mode="json")
    found = {
        name: {"value": values[name], "from": str(origin)}
        if flag_of(name).shown or not values[name]
        else {"from": str(origin)}
        for name, origin in configured.origins.items()
    }
    return json.dumps(found, indent=2)


def help_text() -> str:
    """What ``--help`` prints: every flag with its meaning, by group."""
    groups: dict[str, list[str]] = {}
    for name, field in WorkerConfig.model_fields.items():
        default = field.get_default()
        said = "" if field.is_required() or default in ("", None) else f" Default: {str(default).lower()}."
        lines = groups.setdefault(flag_of(name).group, [])
        lines.append(f"  --{name}")
        lines.extend(
            textwrap.wrap(f"{field.description}{said}", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        )
    for _, written, meaning in _ANSWERS:
        groups.setdefault("Besides", []).extend((f"  {written}", f"      {meaning}"))
    sections = ["\n".join((f"{group}:", *lines)) for group, lines in groups.items()]
    codes = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)
    return "\n".join((_USAGE, *sections, "", textwrap.fill(f"Exit codes: {codes}.", 100)))


class _BooleanOrText(flags.BooleanParser):
    """Lets a wrong value through, so that it is refused together with all other problems."""

    def parse(self, argument: str | int) -> Any:
        """A boolean, or the text as it was given."""
        try:
            return super().parse(argument)
        except (TypeError, ValueError):
            return str(argument)


def _define_flags() -> flags.FlagValues:
    """One absl flag for each field of the configuration. Text stays text: all values are checked together later."""
    given: flags.FlagValues = flags.FlagValues()  # type: ignore[no-untyped-call]
    for name, field in WorkerConfig.model_fields.items():
        if field.annotation is bool:
            flag = flags.BooleanFlag(name, None, field.description or "")
            flag.parser = _BooleanOrText()
            flags.DEFINE_flag(flag, given)
        else:
            flags.DEFINE_string(name, None, field.description or "", flag_values=given)
    for name, _, meaning in _ANSWERS:
        if name == "config":
            flags.DEFINE_string(name, None, meaning, flag_values=given)
        else:
            answer = flags.BooleanFlag(name, False, meaning, short_name="h" if name == "help" else None)
            answer.parser = _BooleanOrText()
            flags.DEFINE_flag(answer, given)
    return given
