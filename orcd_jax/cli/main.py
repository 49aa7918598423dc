"""One call of ``orcd``: parse, connect, do it, and report how it ended."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orcd_jax.cli.arguments import Arguments, Target, parse
from orcd_jax.cli.local import Local
from orcd_jax.cli.terminal import Output, OutputFailed, ReaderGone, complain
from orcd_jax.cli.values import UsageError
from orcd_jax.cli.wishes import AttestWish, CommitWish, PlanWish
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry.narration import duration

if TYPE_CHECKING:  # it takes a while to import, and help needs none of it
    from orcd_jax.cli.connection import CallFailed


_EXIT_OF_LOCAL = {ErrorCode.INVALID_PARAMS: ExitCode.USAGE, ErrorCode.MODEL_LOAD_FAILED: ExitCode.MODEL}
_TOKENS = {"api": ("execute", "ORCD_TOKEN_FILE"), "control": ("control", "ORCD_CONTROL_TOKEN_FILE")}


def main(argv: Sequence[str]) -> ExitCode:
    """Runs ``orcd`` with ``argv``, which leaves out the program's name. Raises nothing."""
    try:
        match parse(argv, os.environ):
            case None:
                return ExitCode.OK
            case Local() as local:
                return _run_local(local)
            case Arguments() as arguments:
                return _run(arguments)
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


def _run_local(call: Local) -> ExitCode:
    try:
        return call.run(Output())
    except OrcdError as error:
        complain(f"error: {error.code}: {error.message}")
        if call.json:
            _report(
                error.code,
                error.message,
                retriable=error.spec.retriable,
                retry_after_ms=error.retry_after_ms,
                field=error.field or "",
            )
        return _EXIT_OF_LOCAL.get(error.code, ExitCode.FAILED)


def _run(arguments: Arguments) -> ExitCode:
    from orcd_jax.cli.connection import CallFailed

    try:
        return asyncio.run(_call(arguments, Output()))
    except CallFailed as failure:
        complain(f"error: {failure.code}: {failure.message}{_hint(failure, arguments.target)}")
        if arguments.json:
            _report(
                failure.code,
                failure.message,
                retriable=failure.retriable,
                retry_after_ms=failure.retry_after_ms,
                field=failure.field,
            )
        return failure.exit_code


async def _call(arguments: Arguments, output: Output) -> ExitCode:
    from orcd_jax.cli import lifecycle, show
    from orcd_jax.cli.connection import Connection
    from orcd_jax.cli.execute import execute

    if arguments.wait_s:
        await show.wait_until_ready(arguments.target, arguments.wait_s)
    as_json = arguments.json
    async with Connection(arguments.target) as worker:
        if arguments.job is not None:
            return await execute(worker, arguments.job, output, as_json=as_json)
        match arguments.wish:
            case PlanWish() as wish:
                return await lifecycle.plan(worker, wish, output, as_json=as_json)
            case CommitWish() as wish:
                return await lifecycle.commit(worker, wish, output, as_json=as_json)
            case AttestWish() as wish:
                return await lifecycle.attest(worker, wish, output, as_json=as_json)
        command = show.ready if arguments.command == "ready" else show.status
        return await command(worker, output, as_json=as_json)


def _hint(failure: CallFailed, target: Target) -> str:
    """What a person may do about it."""
    file = repr(target.token_file[:200])
    if failure.exit_code is ExitCode.UNAUTHENTICATED:
        return f" (the token is from {file})"
    if found := re.search("use a token of --(api|control)_token_file", failure.message):  # a flag of the worker
        role, variable = _TOKENS[found[1]]
        return f" (the token is from {file}; name the file of the {role} token with --token_file or {variable})"
    if failure.retry_after_ms is not None:
        return f" (try again in {duration(failure.retry_after_ms / 1e3)})"
    if failure.retriable and failure.exit_code is not ExitCode.UNREACHABLE:  # that one says itself what to do
        return " (it may succeed later)"
    return ""


def _report(code: str, message: str, *, retriable: bool, retry_after_ms: int | None, field: str) -> None:
    """A failure as an event, for a program."""
    Output().json(
        {
            "event": "error",
            "code": code,
            "message": message,
            "retriable": retriable,
            "retry_after_ms": retry_after_ms,
            "field": field,
        }
    )
