"""The command line of ``orcd``: what may be given, its help, and what is checked before anything is sent."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orcd_jax import __version__

DEFAULT_ADDRESS = "127.0.0.1:50051"
# What the worker takes in one message, and so the longest prompt that can be sent.
MAX_PROMPT_BYTES = 4 * 2**20
MAX_TOKEN_FILE_BYTES = 4096
# gRPC writes a timeout with eight digits.
_MAX_TIMEOUT_S = 99_999_999
_UINT32, _UINT64 = 2**32 - 1, 2**64 - 1

_ABOUT = "Runs jobs on an orcd worker and shows how it is."
_EXAMPLE = """\
example:
  orcd ready   --address=127.0.0.1:50051 --token_file=token
  orcd execute --address=127.0.0.1:50051 --token_file=token --chat "Why is the sky blue?"

`orcd COMMAND --help` tells all flags of a command.

environment:
  ORCD_ADDRESS     where the worker is, for calls without --address
  ORCD_TOKEN_FILE  the file with its token, for calls without --token_file

exit codes:
  0 done; 1 refused, failed or not ready; 2 wrong flags; 6 no worker answers; 7 the token was refused;
  130 interrupted
"""
_ABOUT_EXECUTE = """\
Runs one job and prints the answer as it is made. The answer goes to stdout, a summary to stderr. Ctrl-C cancels the
job. Without --temperature the likeliest token is always taken, so the same prompt gives the same answer.
"""
_EXAMPLE_EXECUTE = """\
example:
  orcd execute --token_file=token --chat --temperature=0.8 --seed=7 "Write a haiku about GPU computing"
  orcd execute --token_file=token --max_tokens=16 --stop="." -- "- a prompt that begins with a dash"
  cat prompt.txt | orcd execute --token_file=token --json -
"""
_EXAMPLE_READY = "example:\n  orcd ready --token_file=token && echo 'the worker takes jobs'\n"
_EXAMPLE_STATUS = "example:\n  orcd status --token_file=token --json\n"


class UsageError(Exception):
    """What was given cannot be used; one sentence says what to do."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it was asked for. None leaves the choice to the worker."""

    prompt: str
    chat: bool
    system: str | None
    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    timeout_s: float | None
    job_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """One call of ``orcd``.

    Attributes:
      command: ``execute``, ``ready`` or ``status``.
      job: with ``execute``, and only then.
    """

    command: str
    address: Address
    token: str
    json: bool
    job: Job | None


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Arguments | None:
    """What was asked for, with the token and the prompt already read; None when help or the version was, and is shown.

    Raises:
      UsageError: something is missing, unknown or cannot be sent.
    """
    for word in argv:
        if not _is_unicode(word):
            raise UsageError(f"{ascii(word)[:80]} is not valid UTF-8: convert it, or set a UTF-8 locale")
    try:
        given, rest = _parser().parse_known_args(list(argv))
    except SystemExit:  # argparse's end after --help and --version; its errors are ours
        return None
    if rest:
        raise UsageError(_unknown(rest[0], given))
    if given.command is None:
        raise UsageError("a command is missing: execute, ready or status; see `orcd --help`")
    address = _address(given.address or environment.get("ORCD_ADDRESS") or DEFAULT_ADDRESS)
    token = _token(given.token_file or environment.get("ORCD_TOKEN_FILE"))
    job = _job(given) if given.command == "execute" else None
    return Arguments(command=given.command, address=address, token=token, json=given.json, job=job)


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, and exit with."""

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ")
        if said.startswith("the following arguments are required"):
            said = "PROMPT is missing: give it in quotes, or - to read it from stdin"
        raise UsageError(f"{said}; see `{self.prog} --help`")


def _parser() -> _Parser:
    parser = _new_parser("orcd", _ABOUT, _EXAMPLE)
    parser.add_argument("--version", action="version", version=f"orcd {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Parser)
    execute = _add_command(commands, "execute", "run one job and print the answer", _ABOUT_EXECUTE, _EXAMPLE_EXECUTE)
    _add_job_flags(execute)
    about = "Shows whether the worker takes jobs, and with which model. Exits with 0 if it does, with 1 if not."
    _add_command(commands, "ready", "whether the worker takes jobs, and with which model", about, _EXAMPLE_READY)
    about = "Shows how the worker is: its model, memory, jobs and device."
    _add_command(commands, "status", "how the worker is", about, _EXAMPLE_STATUS)
    return parser


def _new_parser(name: str, about: str, example: str) -> _Parser:
    return _Parser(
        prog=name,
        description=about,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, about: str, example: str
) -> _Parser:
    command = commands.add_parser(
        name,
        help=summary,
        description=about,
        epilog=example,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    worker = command.add_argument_group("the worker")
    worker.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"where it is, such as 127.0.0.1:50051 or [::1]:50051; else $ORCD_ADDRESS, else {DEFAULT_ADDRESS}",
    )
    worker.add_argument("--token_file", metavar="FILE", help="file with its token; else $ORCD_TOKEN_FILE")
    command.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of text")
    return command


def _add_job_flags(execute: _Parser) -> None:
    execute.add_argument("prompt", metavar="PROMPT", help="what to continue or answer; - reads it from stdin as it is")
    add = execute.add_argument_group("the job").add_argument
    add("--chat", action="store_true", help="ask a chat model: PROMPT is the user's turn of a conversation")
    add("--system", metavar="TEXT", help="the system's turn before it; with --chat")
    add("--max_tokens", metavar="N", type=_whole(_UINT32), default=256, help="most tokens of the answer; default 256")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given repeatedly")
    add("--ignore_eos", action="store_true", help="go on when the model would end")
    add("--timeout", metavar="SECONDS", type=_timeout, help="give up after this time; default: the worker's limit")
    add("--job_id", metavar="ID", help="name of the job; default: a random one")
    add = execute.add_argument_group("sampling").add_argument
    add("--temperature", metavar="X", type=_number, help="0 to 2; above 0 tokens are drawn at random; default 0")
    add("--top_p", metavar="X", type=_number, help="draw among the likeliest that sum up to this, above 0 to 1")
    add("--top_k", metavar="N", type=_whole(_UINT32), help="draw among this many of the likeliest; 0: all")
    add("--min_p", metavar="X", type=_number, help="draw among those this likely relative to the likeliest, 0 to 1")
    add("--seed", metavar="N", type=_whole(_UINT64), help="the same seed draws the same tokens; default: a random one")


def _unknown(word: str, given: argparse.Namespace) -> str:
    name = word.partition("=")[0]
    known = [f"--{flag}" for flag in vars(given) if flag not in ("command", "prompt")]
    see = "see `orcd --help`" if given.command is None else f"see `orcd {given.command} --help`"
    if not word.startswith("-"):
        what = "only one PROMPT is taken: put it in quotes" if given.command == "execute" else "only flags are taken"
        return f"{word[:40]!r} is too much: {what}; {see}"
    if name in known:
        return f"{name}: write it after the command"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name[:40]}: there is no such flag; " + (f"did you mean {near[0]}?" if near else see)


def _job(given: argparse.Namespace) -> Job:
    if given.system is not None and not given.chat:
        raise UsageError("--system goes with --chat: without it there is no conversation; add --chat")
    return Job(
        prompt=_prompt(given.prompt),
        chat=given.chat,
        system=given.system,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        seed=given.seed,
        stop=tuple(given.stop),
        ignore_eos=given.ignore_eos,
        timeout_s=given.timeout,
        job_id=given.job_id,
    )


def _prompt(given: str) -> str:
    if given != "-":
        if not given:
            raise UsageError("PROMPT is empty: give some text")
        return given
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if not data:
        raise UsageError("PROMPT is empty: nothing came from stdin")
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"PROMPT is too long: more than {MAX_PROMPT_BYTES} bytes came from stdin")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"PROMPT is not valid UTF-8 at byte {error.start} of stdin; convert it first") from None


def _address(text: str) -> Address:
    problem = f"--address: {text[:80]!r} is not HOST:PORT; write it like 127.0.0.1:50051, or [::1]:50051 for IPv6"
    found = re.fullmatch(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})", text)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise UsageError(problem)
    if found["ipv6"]:
        try:
            ipaddress.IPv6Address(found["ipv6"])
        except ValueError:
            raise UsageError(problem) from None
    return Address(found["ipv6"] or found["name"], int(found["port"]))


def _token(file: str | None) -> str:
    """The first token of the file: during a rotation it holds two, and either opens the worker."""
    if not file:
        raise UsageError("there is no token: give --token_file=FILE or set ORCD_TOKEN_FILE")
    where = f"--token_file: {file[:200]!r}"
    try:
        with Path(file).open("rb") as source:
            data = source.read(MAX_TOKEN_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        raise UsageError(f"{where} cannot be read ({reason}); name the worker's token file") from None
    if len(data) > MAX_TOKEN_FILE_BYTES:
        raise UsageError(f"{where} has more than {MAX_TOKEN_FILE_BYTES} bytes; name the worker's token file")
    token, _, _ = data.strip().partition(b"\n")
    token = token.strip()
    if not token:
        raise UsageError(f"{where} is empty; put the worker's token into it")
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(f"{where} holds what no token has; a token is printable ASCII without blanks")
    return token.decode("ascii")


def _whole(most: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) > most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 0 to {most}")
        return int(text)

    return whole


def _number(text: str) -> float:
    try:
        value = float(text)
        # The wire holds it in 32 bits; larger ones do not fit.
        fits = math.isfinite(value) and math.isfinite(struct.unpack("<f", struct.pack("<f", value))[0])
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number that can be sent; write it like 0.8")
    return value


def _timeout(text: str) -> float:
    value = _number(text)
    if not 0 < value <= _MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not allowed; it must be above 0, in seconds")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
