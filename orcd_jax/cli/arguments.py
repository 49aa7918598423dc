"""The command line of ``orcd``: its commands, their help, and what is checked before anything is sent."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from orcd_jax import __version__
from orcd_jax.cli import local, values
from orcd_jax.cli.job import Job, add_job, job_of
from orcd_jax.cli.local import Local
from orcd_jax.cli.values import Address, UsageError
from orcd_jax.cli.wishes import Wish, add_attest, add_commit, add_plan, wish_of

if TYPE_CHECKING:
    from ssl import SSLContext

DEFAULT_ADDRESS = "127.0.0.1:50051"
# What only a control token opens.
CONTROL = frozenset({"plan", "commit", "attest", "status"})
_POSITIONAL = frozenset({"command", "prompt", "model", "directory", "file"})

_ABOUT = "Plans, loads and proves models on an orcd worker, runs jobs on it, and shows how it is."
_EXAMPLE = """\
example:
  orcd ready   --address=127.0.0.1:50051 --token_file=token
  orcd execute --address=127.0.0.1:50051 --token_file=token --chat "Why is the sky blue?"

`orcd COMMAND --help` tells all flags of a command.

environment:
  ORCD_ADDRESS             where the worker is, for calls without --address
  ORCD_TOKEN_FILE          the file with its token, for calls without --token_file
  ORCD_CONTROL_TOKEN_FILE  the same for plan, commit, attest and status, which need the control token
  ORCD_TLS_CA_FILE         who signs for the worker, for calls without --tls_ca_file; without either there is no TLS

exit codes:
  0 done; 1 refused, failed, not ready or not whole; 2 wrong flags; 4 the model cannot be used; 6 no worker answers;
  7 the token was refused; 130 interrupted
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
_ABOUT_READY = "Shows whether the worker takes jobs, and with which model. Exits with 0 if it does, with 1 if not."
_EXAMPLE_READY = """\
example:
  orcd ready --token_file=token && echo 'the worker takes jobs'
  orcd ready --token_file=token --wait=120
"""
_ABOUT_STATUS = "Shows how the worker is: its model, memory, jobs and device."
_EXAMPLE_STATUS = "example:\n  orcd status --token_file=token --json\n"
_ABOUT_PLAN = """\
Shows whether a model would load, what it would take, and every reason why not. Allocates nothing. With --device_memory
no worker is asked: MODEL is the directory of a converted model, and the GPU need not be there.
"""
_EXAMPLE_PLAN = """\
example:
  orcd plan --token_file=token                          the model the worker was started with
  orcd plan model/ --device_memory=24GiB --slots=16     a GPU that is not there
"""
_ABOUT_COMMIT = """\
Has the worker load a model and seal it. Joins in when that is under way, or done already. Ctrl-C only stops watching.
"""
_EXAMPLE_COMMIT = "example:\n  orcd commit --token_file=token --expected_digest=$(cat digest)\n"
_ABOUT_ATTEST = """\
Has the worker prove every byte of its weights now, and checks the signed answer. Without --identity the key is the one
that the worker tells, which shows nothing of who it is.
"""
_EXAMPLE_ATTEST = """\
example:
  orcd attest --token_file=token --expected_digest=$(cat digest) --identity=$(cat worker.pub)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The worker to call, and what opens it.

    Attributes:
      token_file: where the token is from.
      tls: None: plain text.
    """

    address: Address
    token: str = field(repr=False)
    token_file: str
    tls: SSLContext | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """One call of a worker.

    Attributes:
      command: its name.
      job: with ``execute``, and only then.
      wish: with ``plan``, ``commit`` and ``attest``.
      wait_s: with ``ready``: seconds to wait for a worker that does not take jobs yet.
    """

    command: str
    target: Target
    json: bool
    job: Job | None = None
    wish: Wish | None = None
    wait_s: float = 0.0


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Arguments | Local | None:
    """What was asked for, with the token and the prompt already read; None when help or the version was, and is shown.

    Raises:
      UsageError: something is missing, unknown or cannot be sent.
    """
    for word in argv:
        if not values.is_unicode(word):
            raise UsageError(f"{ascii(word)[:80]} is not valid UTF-8: convert it, or set a UTF-8 locale")
    try:
        given, rest = _parser().parse_known_args(list(argv))
    except SystemExit:  # argparse's end after --help and --version; its errors are ours
        return None
    if rest:
        raise UsageError(_unknown(rest[0], given))
    if given.command is None:
        raise UsageError(f"a command is missing: {', '.join(_COMMANDS)}; see `orcd --help`")
    return local.command_of(given) or Arguments(
        command=given.command,
        target=_target(given, environment),
        json=given.json,
        job=job_of(given) if given.command == "execute" else None,
        wish=wish_of(given),
        wait_s=given.wait if given.command == "ready" else 0.0,
    )


def _target(given: argparse.Namespace, environment: Mapping[str, str]) -> Target:
    address = values.address(given.address or environment.get("ORCD_ADDRESS") or DEFAULT_ADDRESS)
    file = _token_file(given, environment)
    return Target(address=address, token=values.token(file), token_file=file, tls=_tls(given, environment))


def _token_file(given: argparse.Namespace, environment: Mapping[str, str]) -> str:
    variables = _token_variables(given.command)
    found = [given.token_file, *(environment.get(name) for name in variables)]
    file: str | None = next(filter(None, found), None)
    if file is None:
        whose = "control token" if given.command in CONTROL else "token"
        raise UsageError(f"there is no {whose}: give --token_file=FILE or set {variables[0]}")
    return file


def _token_variables(command: str) -> list[str]:
    """Where the file's name is looked for, in this order."""
    return [*(["ORCD_CONTROL_TOKEN_FILE"] if command in CONTROL else []), "ORCD_TOKEN_FILE"]


def _tls(given: argparse.Namespace, environment: Mapping[str, str]) -> SSLContext | None:
    ca_file = given.tls_ca_file or environment.get("ORCD_TLS_CA_FILE")
    if ca_file:
        from orcd_jax.cli.tls import client_context

        return client_context(ca_file, given.tls_cert_file, given.tls_key_file)
    for flag, value in (("tls_cert_file", given.tls_cert_file), ("tls_key_file", given.tls_key_file)):
        if value is not None:
            raise UsageError(f"--{flag} goes with --tls_ca_file: without that there is no TLS")
    return None


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, and exit with."""

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ")
        missing = said.removeprefix("the following arguments are required: ")
        if missing == "PROMPT":
            said = "PROMPT is missing: give it in quotes, or - to read it from stdin"
        elif missing != said:
            said = f"{missing} {'are' if ', ' in missing else 'is'} missing"
        raise UsageError(f"{said}; see `{self.prog} --help`")


@dataclass(frozen=True, slots=True)
class _Command:
    """One command: its line in the list, its help, and what adds its own flags."""

    summary: str
    about: str
    add: Callable[[argparse.ArgumentParser], None]
    example: str = ""
    asks_worker: bool = True


def _add_ready(command: argparse.ArgumentParser) -> None:
    about = "wait this long for a worker that is not ready yet"
    command.add_argument("--wait", metavar="SECONDS", type=values.seconds, default=0.0, help=about)


def _add_nothing(command: argparse.ArgumentParser) -> None:
    """Status has no flags of its own."""


_COMMANDS: dict[str, _Command] = {
    "execute": _Command("run one job and print the answer", _ABOUT_EXECUTE, add_job, _EXAMPLE_EXECUTE),
    "ready": _Command("whether the worker takes jobs, and with which model", _ABOUT_READY, _add_ready, _EXAMPLE_READY),
    "status": _Command("how the worker is", _ABOUT_STATUS, _add_nothing, _EXAMPLE_STATUS),
    "plan": _Command("whether a model would load, and what it takes", _ABOUT_PLAN, add_plan, _EXAMPLE_PLAN),
    "commit": _Command("load a model and seal it", _ABOUT_COMMIT, add_commit, _EXAMPLE_COMMIT),
    "attest": _Command("prove the weights, now", _ABOUT_ATTEST, add_attest, _EXAMPLE_ATTEST),
    **{
        name: _Command(one.summary, one.about, one.add, one.example, asks_worker=False)
        for name, one in local.COMMANDS.items()
    },
}


def _parser() -> _Parser:
    parser = _Parser(
        prog="orcd",
        description=_ABOUT,
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"orcd {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.summary,
            description=command.about,
            epilog=command.example,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(own)
        if command.asks_worker:
            _add_worker(own, " or ".join(f"${variable}" for variable in _token_variables(name)))
        own.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of text")
    return parser


def _add_worker(command: argparse.ArgumentParser, variables: str) -> None:
    add = command.add_argument_group("the worker").add_argument
    where = f"where it is, such as 127.0.0.1:50051 or [::1]:50051; else $ORCD_ADDRESS, else {DEFAULT_ADDRESS}"
    add("--address", metavar="HOST:PORT", help=where)
    add("--token_file", metavar="FILE", help=f"file with its token; else {variables}")
    add("--tls_ca_file", metavar="FILE", help="call it over TLS; PEM of who signs for it; else $ORCD_TLS_CA_FILE")
    add("--tls_cert_file", metavar="FILE", help="PEM of your own certificate, for a worker that wants one")
    add("--tls_key_file", metavar="FILE", help="PEM of the private key of --tls_cert_file")


def _unknown(word: str, given: argparse.Namespace) -> str:
    name = word.partition("=")[0]
    known = [f"--{flag}" for flag in vars(given) if flag not in _POSITIONAL]
    see = "see `orcd --help`" if given.command is None else f"see `orcd {given.command} --help`"
    if not word.startswith("-"):
        what = "only one PROMPT is taken: put it in quotes" if given.command == "execute" else "only flags are taken"
        if vars(given).keys() & (_POSITIONAL - {"command", "prompt"}):
            what = "only flags are taken after the first"
        return f"{word[:40]!r} is too much: {what}; {see}"
    if name in known:
        return f"{name}: write it after the command"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name[:40]}: there is no such flag; " + (f"did you mean {near[0]}?" if near else see)
