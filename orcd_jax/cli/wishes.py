"""What ``orcd plan``, ``commit`` and ``attest`` ask a worker, as it is given on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from orcd_jax.cli.values import UINT32, content, digest, public_key, whole

MAX_SIGNATURE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWish:
    """What a worker is asked to plan for; empty and None leave it to the worker."""

    model_ref: str
    max_context: int | None
    slots: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitWish:
    """What a worker is asked to load; empty and None leave it to the worker."""

    model_ref: str
    shard_id: str
    expected_digest: str
    signature: bytes
    max_context: int | None
    slots: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestWish:
    """What the caller knows of a worker beforehand; empty: nothing.

    Attributes:
      identity: its public key, 64 hex digits; empty: the one it tells is believed.
    """

    handle_id: str
    expected_digest: str
    identity: str
    pool_id: str


Wish = PlanWish | CommitWish | AttestWish


def add_plan(command: argparse.ArgumentParser) -> None:
    """Flags of ``orcd plan``."""
    command.add_argument("model", metavar="MODEL", nargs="?", default="", help="a model's reference, or its directory")
    _add_sizes(command)
    add = command.add_argument_group("for a GPU that is not there: no worker is asked").add_argument
    add("--device_memory", metavar="SIZE", type=_size, help="its memory, such as 24GiB or 80GB")
    add("--device", metavar="NAME", default="", help='its name, such as "NVIDIA H200"')


def add_commit(command: argparse.ArgumentParser) -> None:
    """Flags of ``orcd commit``."""
    command.add_argument("model", metavar="MODEL", nargs="?", default="", help="default: the worker's --model_path")
    _add_sizes(command)
    add = command.add_argument_group("trust").add_argument
    add("--expected_digest", metavar="HEX", type=digest, help="the digest that the weights must have")
    add("--signature_file", metavar="FILE", help="a signature over the model, by a key that the worker trusts")
    add("--shard_id", metavar="ID", default="", help="name of the shard; default: made from the digest")


def add_attest(command: argparse.ArgumentParser) -> None:
    """Flags of ``orcd attest``."""
    add = command.add_argument_group("what you know beforehand").add_argument
    add("--expected_digest", metavar="HEX", type=digest, help="the digest that the weights must have")
    add("--identity", metavar="HEX", type=public_key, help="its public key; default: the one it tells")
    add("--handle_id", metavar="ID", default="", help="the handle; default: what is loaded")
    add("--pool_id", metavar="ID", default="", help="the worker's pool; default: the one it tells")


def wish_of(given: argparse.Namespace) -> Wish | None:
    """What a parsed call asks; None when it is another command.

    Raises:
      UsageError: a file cannot be used.
    """
    match given.command:
        case "plan":
            return PlanWish(model_ref=given.model, max_context=given.max_context, slots=given.slots)
        case "commit":
            return CommitWish(
                model_ref=given.model,
                shard_id=given.shard_id,
                expected_digest=given.expected_digest or "",
                signature=b"" if given.signature_file is None else _signature(given.signature_file),
                max_context=given.max_context,
                slots=given.slots,
            )
        case "attest":
            return AttestWish(
                handle_id=given.handle_id,
                expected_digest=given.expected_digest or "",
                identity=given.identity or "",
                pool_id=given.pool_id,
            )
        case _:
            return None


def _add_sizes(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sizes").add_argument
    add("--max_context", metavar="N", type=whole(UINT32), help="most tokens of a job; default: the worker's own")
    add("--slots", metavar="N", type=whole(UINT32), help="jobs that run together; default: the worker's own")


def _signature(file: str) -> bytes:
    return content("signature_file", file, MAX_SIGNATURE_BYTES, "name the file that `orcd sign` wrote")


def _size(text: str) -> int:
    from orcd_jax.cli.plan import parse_size

    return parse_size(text)
