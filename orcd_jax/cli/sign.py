"""``orcd sign``, ``orcd verify`` and ``orcd keygen``: who vouches for a converted checkpoint, without a worker."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from orcd_jax.checkpoint.bundle import CURVES, sign_bundle
from orcd_jax.checkpoint.manifest import Manifest, parse_manifest, read_manifest_bytes
from orcd_jax.checkpoint.signature import (
    PublicKey,
    SignedBy,
    default_signature_path,
    load_public_keys,
    read_signature,
    sign_manifest,
    verify_signature,
)
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.keys import IdentityKey, read_private_key, write_private_key
from orcd_jax.telemetry.narration import count, size

if TYPE_CHECKING:
    from orcd_jax.checkpoint.progress import Progress

_NO_ORIGIN = "none was checked: the files are whole, which proves nothing about where they come from"
_KINDS = {"ed25519": "detached, Ed25519", "openssf-bundle": "OpenSSF bundle"}


def sign_checkpoint(
    directory: Path, key_file: Path, out: Path | None, output: Output, *, bundle: bool = False, as_json: bool = False
) -> ExitCode:
    """Checks every file of a checkpoint against its manifest, and signs it.

    Args:
      directory: the checkpoint.
      key_file: PEM file of the private key: Ed25519, or elliptic curve for a bundle.
      out: the signature's file, replaced if it is there; None: ``DIRECTORY.sig`` beside the directory.
      output: where the result is shown.
      bundle: make an OpenSSF model-signing bundle instead of a detached signature.
      as_json: show one JSON object instead of a table.

    Raises:
      OrcdError: INVALID_PARAMS: a key or path cannot be used. MODEL_LOAD_FAILED: the checkpoint is damaged.
    """
    out = out or default_signature_path(directory)
    if out.resolve().is_relative_to(directory.resolve()):
        raise _refusal("out", "it lies in the checkpoint, where a worker refuses files that are not in the manifest")
    key = _curve_key(key_file) if bundle else IdentityKey.load(key_file, field="key_file")
    raw = read_manifest_bytes(directory)
    manifest = _checked(directory, raw)
    if isinstance(key, IdentityKey):
        signature, public = sign_manifest(key, raw), PublicKey(Ed25519PublicKey.from_public_bytes(key.public_bytes))
    else:
        signature, public = sign_bundle(directory, key_file), PublicKey(key.public_key())
    by = verify_signature(raw, signature, [public])  # what leaves here is what is accepted elsewhere
    _replace(out, signature, "out")
    _show(output, manifest, by, as_json=as_json, written=out)
    return ExitCode.OK


def verify_checkpoint(
    directory: Path,
    signature_file: Path | None,
    public_key_file: Path | None,
    output: Output,
    *,
    as_json: bool = False,
) -> ExitCode:
    """Checks a checkpoint's signature, if there is a key to check it with, and then every file.

    Args:
      directory: the checkpoint.
      signature_file: either kind; None: ``DIRECTORY.sig``, if there is a ``public_key_file``.
      public_key_file: PEM file of trusted public keys; None: only the files are checked.
      output: where the result is shown.
      as_json: show one JSON object instead of a table.

    Raises:
      OrcdError: as ``checkpoint.signature.verify_signature`` and ``checkpoint.verify.verify_files``.
    """
    if signature_file is not None and public_key_file is None:
        raise _refusal("public_key_file", "it is missing: a signature is checked with the signer's public key")
    raw, by = read_manifest_bytes(directory), None
    if public_key_file is not None:
        trusted = load_public_keys(public_key_file, field="public_key_file")
        by = verify_signature(raw, read_signature(signature_file or default_signature_path(directory)), trusted)
    _show(output, _checked(directory, raw), by, as_json=as_json)
    return ExitCode.OK


def keygen(path: Path, output: Output, *, bundle: bool = False, as_json: bool = False) -> ExitCode:
    """Makes a key pair to sign with: ``path``, for its owner alone, and ``path.pub``, for all. Replaces nothing.

    Args:
      path: the private key's file.
      output: where the result is shown.
      bundle: make an elliptic curve key (P-256), for bundles, instead of one of Ed25519.
      as_json: show one JSON object instead of a table.

    Raises:
      OrcdError: INVALID_PARAMS: a file is there already or cannot be written.
    """
    public_path = path.with_name(f"{path.name}.pub")
    if os.path.lexists(public_path):
        raise _refusal("key_file", f"{public_path.name} is there already; a key is never replaced: name another file")
    key = generate_private_key(SECP256R1()) if bundle else Ed25519PrivateKey.generate()
    try:
        write_private_key(path, key)
    except FileExistsError:
        raise _refusal("key_file", "it is there already; a key is never replaced: name another file") from None
    except OSError as error:
        raise _refusal("key_file", f"it cannot be written ({error.strerror})") from None
    public = key.public_key()
    _replace(public_path, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "key_file")
    kind, fingerprint = "ecdsa-p256" if bundle else "ed25519", PublicKey(public).fingerprint
    if as_json:
        output.json(
            {"kind": kind, "key": fingerprint, "private_key_file": str(path), "public_key_file": str(public_path)}
        )
    else:
        output.rows(
            {
                "key": f"{fingerprint} ({kind})",
                "private": f"{path} (keep it secret)",
                "public": f"{public_path} (give it to those who verify)",
            }
        )
    return ExitCode.OK


def _checked(directory: Path, raw: bytes) -> Manifest:
    """The manifest of these bytes, with which all files of ``directory`` agree."""
    from orcd_jax.checkpoint.verify import verify_files  # takes a second to import

    manifest = parse_manifest(raw)
    with _bar("checking the files") as on_progress:
        verify_files(directory, manifest, on_progress)
    return manifest


@contextmanager
def _bar(text: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(text, total=None)
        yield lambda point: bars.update(task, completed=point.done, total=point.total)


def _show(
    output: Output, manifest: Manifest, by: SignedBy | None, *, as_json: bool, written: Path | None = None
) -> None:
    files, total = len(manifest.files), sum(entry.size_bytes for entry in manifest.files)
    if as_json:
        fields: Mapping[str, object] = {
            "model": manifest.model.model_id,
            "digest": manifest.digest,
            "files": files,
            "bytes": total,
            "signature": None if by is None else {"kind": by.kind, "key": by.fingerprint},
            "origin_proved": by is not None,
        }
        output.json(fields if written is None else {**fields, "signature_file": str(written)})
        return
    rows = {
        "model": manifest.model.model_id,
        "digest": manifest.digest,
        "files": f"{count(files, 'file')}, {size(total)}, all as in manifest.json",
        "signature": _NO_ORIGIN if by is None else f"good, by key {by.fingerprint} ({_KINDS[by.kind]})",
    }
    output.rows(rows if written is None else {**rows, "written to": str(written)})


def _curve_key(path: Path) -> EllipticCurvePrivateKey:
    """The private key for a bundle."""
    key = read_private_key(path, "key_file")
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise _refusal("key_file", f"a bundle needs a key on one of {', '.join(CURVES)}: `orcd keygen --bundle`")
    return key


def _replace(path: Path, data: bytes, field: str) -> None:
    """Writes a file that all may read, whole or not at all."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(field, f"{path.name} cannot be written ({error.strerror})") from None


def _refusal(field: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"--{field}: {problem}", field=field)
