"""One call of ``orcd``: parse, connect, do it, and report how it ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orcd_jax.cli.arguments import Arguments, UsageError, parse
from orcd_jax.cli.terminal import Output, OutputFailed, ReaderGone, complain
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.narration import duration

if TYPE_CHECKING:  # it takes a while to import, and help needs none of it
    from orcd_jax.cli.connection import CallFailed


def main(argv: Sequence[str]) -> ExitCode:
    """Runs ``orcd`` with ``argv``, which leaves out the program's name. Raises nothing."""
    try:
        arguments = parse(argv, os.environ)
        return ExitCode.OK if arguments is None else _run(arguments)
    except UsageError as error:
        complain(f"error: {error}")
        return ExitCode.USAGE
    except OutputFailed as error:
        complain(f"error: the answer cannot be written: {error}")
        return ExitCode.FAILED
    except ReaderGone:
        return ExitCode.FAILED
    except KeyboardInterrupt:
        complain("interrupted")
        return ExitCode.INTERRUPTED
    except Exception as error:  # a person gets a line, never a traceback
        complain(f"error: {ExitCode.INTERNAL.name}: a bug in orcd, please report it: {type(error).__name__}: {error}")
        return ExitCode.INTERNAL


def _run(arguments: Arguments) -> ExitCode:
    from orcd_jax.cli.connection import CallFailed

    try:
        return asyncio.run(_call(arguments, Output()))
    except CallFailed as failure:
        _report(failure, as_json=arguments.json)
        return failure.exit_code


async def _call(arguments: Arguments, output: Output) -> ExitCode:
    from orcd_jax.cli import show
    from orcd_jax.cli.connection import Connection
    from orcd_jax.cli.execute import execute

    async with Connection(arguments.address, arguments.token) as worker:
        if arguments.job is not None:
            return await execute(worker, arguments.job, output, as_json=arguments.json)
        command = show.ready if arguments.command == "ready" else show.status
        return await command(worker, output, as_json=arguments.json)


def _report(failure: CallFailed, *, as_json: bool) -> None:
    """A line on stderr for a person; with ``--json`` also an event on stdout for a program."""
    hint = ""
    if failure.retry_after_ms is not None:
        hint = f" (try again in {duration(failure.retry_after_ms / 1e3)})"
    elif failure.retriable and failure.exit_code is not ExitCode.UNREACHABLE:  # that one says itself what to do
        hint = " (it may succeed later)"
    complain(f"error: {failure.code}: {failure.message}{hint}")
    if as_json:
        Output().json(
            {
                "event": "error",
                "code": failure.code,
                "message": failure.message,
                "retriable": failure.retriable,
                "retry_after_ms": failure.retry_after_ms,
                "field": failure.field,
            }
        )
