"""The commands of ``orcd`` that ask no worker: ``sign``, ``verify``, ``keygen``, ``audit``, ``plan`` of a folder."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orcd_jax.cli.terminal import Output
from orcd_jax.cli.values import UsageError
from orcd_jax.errors import ExitCode

if TYPE_CHECKING:
    from orcd_jax.telemetry.audit_record import Head


@dataclass(frozen=True, slots=True)
class Local:
    """A call that asks no worker.

    Attributes:
      run: does it; raises OrcdError.
    """

    json: bool
    run: Callable[[Output], ExitCode]


def command_of(given: argparse.Namespace) -> Local | None:
    """What a parsed call does; None when it asks a worker.

    Raises:
      UsageError: its flags do not go together.
    """
    if given.command == "plan":
        return _plan(given)
    command = COMMANDS.get(given.command)
    return None if command is None else Local(given.json, functools.partial(command.run, given))


def _plan(given: argparse.Namespace) -> Local | None:
    """Arithmetic over a model's manifest, if the memory of a device is given."""
    if given.device_memory is None:
        if given.device:
            raise UsageError("--device goes with --device_memory: without it the worker's own device is planned for")
        return None
    if not given.model:
        raise UsageError("MODEL is missing: with --device_memory it is the directory of a converted model")
    return Local(given.json, functools.partial(_run_plan, given))


def _run_plan(given: argparse.Namespace, output: Output) -> ExitCode:
    from orcd_jax.cli.plan import plan

    return plan(
        Path(given.model),
        output,
        device_memory=given.device_memory,
        device=given.device,
        slots_total=given.slots or 0,
        max_context=given.max_context,
        as_json=given.json,
    )


def _add_sign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIRECTORY", help="the converted checkpoint")
    parser.add_argument("--key_file", metavar="FILE", required=True, help="private key, as `orcd keygen` makes it")
    parser.add_argument("--out", metavar="FILE", help="the signature's file; default: DIRECTORY.sig")
    parser.add_argument("--bundle", action="store_true", help="make an OpenSSF model-signing bundle (needs [signing])")


def _sign(given: argparse.Namespace, output: Output) -> ExitCode:
    from orcd_jax.cli.sign import sign_checkpoint  # cryptography takes a while to import, here and below

    return sign_checkpoint(
        Path(given.model), Path(given.key_file), _path(given.out), output, bundle=given.bundle, as_json=given.json
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIRECTORY", help="the converted checkpoint")
    parser.add_argument("--public_key_file", metavar="FILE", help="public keys whose signature counts (PEM)")
    parser.add_argument("--signature_file", metavar="FILE", help="default: DIRECTORY.sig")


def _verify(given: argparse.Namespace, output: Output) -> ExitCode:
    from orcd_jax.cli.sign import verify_checkpoint

    return verify_checkpoint(
        Path(given.model), _path(given.signature_file), _path(given.public_key_file), output, as_json=given.json
    )


def _add_keygen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the private key is written there, the public one to FILE.pub")
    parser.add_argument("--bundle", action="store_true", help="a P-256 key, for OpenSSF bundles, instead of Ed25519")


def _keygen(given: argparse.Namespace, output: Output) -> ExitCode:
    from orcd_jax.cli.sign import keygen

    return keygen(Path(given.file), output, bundle=given.bundle, as_json=given.json)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIRECTORY", help="the audit directory: audit/ in a worker's state")
    about = "a head that was published: shows that no end was cut off; `orcd status` shows it as audit"
    parser.add_argument("--head", metavar="SEQ:HASH", type=_head, help=about)


def _audit(given: argparse.Namespace, output: Output) -> ExitCode:
    from orcd_jax.cli.audit import audit

    return audit(Path(given.directory), given.head, output, as_json=given.json)


def _head(text: str) -> Head:
    from orcd_jax.telemetry.audit_record import Head

    found = re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", text)
    if found is None:
        raise argparse.ArgumentTypeError("it must be SEQ:HASH, a record's number and its 64 hex digits")
    return Head(int(found[1]), found[2])


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


class _Command(NamedTuple):
    summary: str
    about: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Output], ExitCode]
    example: str


COMMANDS: dict[str, _Command] = {
    "keygen": _Command(
        "make a key pair to sign models with",
        "Makes a key pair to sign models with. Replaces nothing.",
        _add_keygen,
        _keygen,
        "example:\n  orcd keygen release.key\n",
    ),
    "sign": _Command(
        "sign a converted model",
        "Checks every file of a converted model, and signs it.",
        _add_sign,
        _sign,
        "example:\n  orcd sign model/ --key_file=release.key\n",
    ),
    "verify": _Command(
        "check a model's signature and files",
        "Checks who signed a converted model, and every file. Without --public_key_file the files only.",
        _add_verify,
        _verify,
        "example:\n  orcd verify model/ --public_key_file=release.key.pub\n",
    ),
    "audit": _Command(
        "check a worker's audit log",
        "Checks every hash and every link of an audit log. Exits with 0 if it is whole, with 1 if broken or empty.",
        _add_audit,
        _audit,
        "example:\n  orcd audit /var/lib/orcd-jax/w1/audit\n",
    ),
}
"""By name, with their lines of help."""
