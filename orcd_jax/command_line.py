"""The worker's command line: absl flags made from the fields of :class:`WorkerConfig`, and its help."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from orcd_jax import __version__
from orcd_jax.config import ConfigError, WorkerConfig, flag_of
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.log import neutral

_USAGE = (
    "orcd-worker: one process, one GPU, one language model, streamed over gRPC.\n\n"
    "usage: orcd-worker --worker_id=ID --pool_id=ID --model_path=DIR --rpc_port=PORT --api_token_file=FILE\n"
    "                   (--readiness_callback_url=URL | --standalone) [flags]\n"
)


def parse(argv: Sequence[str]) -> WorkerConfig | None:
    """The configuration the flags give; None when ``--help`` or ``--version`` was asked for and answered.

    Raises:
      ConfigError: a flag is unknown, or a value is missing or not allowed. All problems at once.
    """
    given = _define_flags()
    try:
        rest = given(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(WorkerConfig.model_fields), n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; see --help"
        raise ConfigError([f"--{neutral(error.flagname, 40)}: there is no such flag{hint}"]) from None
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
    values: dict[str, str | bool] = {}
    for name in WorkerConfig.model_fields:
        value: str | bool | None = given[name].value
        if value is not None:
            values[name] = value
    return WorkerConfig.from_flags(values)


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
    flags.DEFINE_boolean("help", False, "Show this help.", flag_values=given, short_name="h")
    flags.DEFINE_boolean("version", False, "Show the version.", flag_values=given)
    return given
