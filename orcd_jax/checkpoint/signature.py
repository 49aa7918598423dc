r"""Signatures over a whole checkpoint, and the public keys whose signatures are trusted.

``manifest.json`` holds the SHA-256 of every other file, so a signature over its exact bytes is one over all of them.
Two kinds are known, told apart by what they hold (``docs/signatures.md``):

- a detached signature, made by ``orcd sign``: JSON that names the key and holds the Ed25519 signature of
  ``"orcd-checkpoint-signature-v1\0" ‖ canonical JSON of {manifest_sha256, model_digest}``;
- an OpenSSF model-signing bundle, made with an elliptic curve key (``checkpoint.bundle``).

A signature lies beside the checkpoint's directory, not in it: a file that the manifest does not list is refused there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orcd_jax.checkpoint import untrusted_json
from orcd_jax.checkpoint.bundle import CURVES, key_hint, verify_bundle
from orcd_jax.checkpoint.manifest import MAX_MANIFEST_VALUES, Sha256, canonical_json
from orcd_jax.checkpoint.regular_file import open_regular
from orcd_jax.errors import ErrorCode, OrcdError

DOMAIN = b"orcd-checkpoint-signature-v1\0"
FORMAT: Final = "orcd-signature"
FORMAT_VERSION = 1
MAX_SIGNATURE_BYTES = 4 * 1024 * 1024  # what one message to a worker may have; a bundle has some 200 bytes a file
MAX_SIGNATURE_VALUES = 1_000  # a bundle's list of files is one text in it
MAX_KEYS_FILE_BYTES = 64 * 1024
MAX_TRUSTED_KEYS = 64

_FIELD = "signature"
_BEGIN = b"-----BEGIN "


class SigningKey(Protocol):
    """An Ed25519 key pair that signs, such as ``residency.keys.IdentityKey``."""

    @property
    def fingerprint(self) -> str:
        """As :attr:`PublicKey.fingerprint`."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``: 64 bytes."""
        ...


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key: Ed25519, for detached signatures; or on a NIST curve, for bundles."""

    key: Ed25519PublicKey | EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of SHA-256 of the key: a name for people, not a proof.

        Of its 32 raw bytes if it is one of Ed25519, else of its DER form (SubjectPublicKeyInfo).
        """
        if isinstance(self.key, Ed25519PublicKey):
            data = self.key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        else:
            data = self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class SignedBy:
    """Whose signature was found good.

    Attributes:
      kind: what the signature is.
      fingerprint: of the trusted key that made it.
    """

    kind: Literal["ed25519", "openssf-bundle"]
    fingerprint: str


class _Detached(BaseModel):
    """The content of a detached signature's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["orcd-signature"]
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]  # unlike Literal, neither true nor 1.0
    algorithm: Literal["ed25519"]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    manifest_sha256: Sha256
    model_digest: Sha256
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def statement(self) -> bytes:
        """The bytes that are signed."""
        return DOMAIN + canonical_json({"manifest_sha256": self.manifest_sha256, "model_digest": self.model_digest})


def sign_manifest(key: SigningKey, manifest_bytes: bytes) -> bytes:
    """The content of a detached signature's file.

    Args:
      key: the signer's.
      manifest_bytes: all of ``manifest.json``.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when that is no manifest.
    """
    unsigned = _Detached(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        algorithm="ed25519",
        key=key.fingerprint,
        manifest_sha256=hashlib.sha256(manifest_bytes).hexdigest(),
        model_digest=_named_digest(manifest_bytes),
        signature="0" * 128,
    )
    signed = unsigned.model_copy(update={"signature": key.sign(unsigned.statement()).hex()})
    return json.dumps(signed.model_dump(), indent=2, sort_keys=True).encode() + b"\n"


def verify_signature(manifest_bytes: bytes, signature: bytes, trusted: Sequence[PublicKey]) -> SignedBy:
    """Checks a signature over a checkpoint, before anything of the checkpoint is parsed.

    What it vouches for is exactly these bytes: parse them, not the file once more, and check all files against them
    (``checkpoint.verify.verify_files``).

    Args:
      manifest_bytes: all of ``manifest.json``.
      signature: the content of a signature file of either kind.
      trusted: whose signatures count.

    Raises:
      OrcdError: INVALID_PARAMS: it is not a signature of a kind that is known, or there are no trusted keys.
        POLICY_VIOLATION: it was made with a key that is not trusted. MODEL_LOAD_FAILED: it was made with a trusted key,
        but it or the manifest was changed, or it is of another model.
    """
    if not trusted:
        raise _unusable("no key is trusted: name a PEM file of public keys with --trusted_keys_file")
    value = _parse(signature)
    manifest_sha256 = hashlib.sha256(manifest_bytes).hexdigest()
    if "mediaType" in value:
        on_curves = {key_hint(of.key): of.key for of in trusted if isinstance(of.key, EllipticCurvePublicKey)}
        hint = verify_bundle(value, on_curves, manifest_sha256)
        return SignedBy("openssf-bundle", PublicKey(on_curves[hint]).fingerprint)
    detached = _detached(value)
    keys_by_name = {of.fingerprint: of.key for of in trusted if isinstance(of.key, Ed25519PublicKey)}
    key = keys_by_name.get(detached.key)
    if key is None:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION,
            f"the model is signed with key {detached.key}, which is none of the {len(keys_by_name)} trusted Ed25519 "
            "keys: trust that key, or have the model signed with one of yours",
            field=_FIELD,
        )
    try:
        key.verify(bytes.fromhex(detached.signature), detached.statement())
    except InvalidSignature:
        raise _wrong("it was changed after it was made") from None
    if detached.manifest_sha256 != manifest_sha256:
        raise _wrong("it is of another model: manifest.json has another SHA-256")
    if detached.model_digest != _named_digest(manifest_bytes):
        raise _wrong("it names another model digest than manifest.json")
    return SignedBy("ed25519", detached.key)


def load_public_keys(path: Path, *, field: str = "trusted_keys_file") -> tuple[PublicKey, ...]:
    """Reads a PEM file of one or several public keys. Text outside of the PEM blocks is for people.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
    """
    # Whoever can add a key to it decides what is trusted.
    data = _read(path, field, MAX_KEYS_FILE_BYTES, refused_mode=0o022)
    blocks = data.split(_BEGIN)[1:]
    if not 1 <= len(blocks) <= MAX_TRUSTED_KEYS:
        raise _refusal(field, f"it holds {len(blocks)} PEM blocks; put 1 to {MAX_TRUSTED_KEYS} public keys there")
    return tuple(_public_key(block, number, field) for number, block in enumerate(blocks, 1))


def read_signature(path: Path, *, field: str = "signature_file") -> bytes:
    """Reads a signature file of either kind.

    Raises:
      OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
    """
    return _read(path, field, MAX_SIGNATURE_BYTES)


def default_signature_path(directory: Path) -> Path:
    """Where the signature of a checkpoint lies by default: beside its directory, ``DIRECTORY.sig``."""
    whole = directory.resolve()
    return whole.with_name(f"{whole.name}.sig")


def _public_key(block: bytes, number: int, field: str) -> PublicKey:
    """The key of one PEM block, of which the first word is cut off."""
    if not block.startswith(b"PUBLIC KEY-----"):
        what = "a private key: remove it" if b"PRIVATE KEY" in block[:64] else "something else"
        raise _refusal(
            field, f"block {number} is not a public key but {what}; `openssl pkey -pubout` makes public ones"
        )
    try:
        key = load_pem_public_key(_BEGIN + block)
    except (ValueError, UnsupportedAlgorithm):
        raise _refusal(field, f"block {number} is a damaged or unknown public key") from None
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES):
        return PublicKey(key)
    raise _refusal(field, f"block {number} is a key of another kind; Ed25519 and {', '.join(CURVES)} are known")


def _parse(signature: bytes) -> dict[str, object]:
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise _unusable(f"it has {len(signature)} bytes; the limit is {MAX_SIGNATURE_BYTES}")
    try:
        value = untrusted_json.load(signature, most=MAX_SIGNATURE_VALUES)
    except ValueError:
        raise _unusable(
            f"it is not JSON, names a field twice, or holds more than {MAX_SIGNATURE_VALUES} values; `orcd sign` and "
            "model-signing make such files"
        ) from None
    if not isinstance(value, dict):
        raise _unusable("it is JSON, but not an object")
    return value


def _detached(value: dict[str, object]) -> _Detached:
    if value.get("format") != FORMAT:
        raise _unusable("it is neither a detached signature of `orcd sign` nor an OpenSSF model-signing bundle")
    if value.get("format_version") != FORMAT_VERSION:
        raise _unusable(f"it has another format_version than {FORMAT_VERSION}, the one known here: sign again")
    try:
        return _Detached.model_validate(value)
    except ValidationError as error:
        names = {str(part) for problem in error.errors() for part in problem["loc"][:1]}
        known = sorted(names & _Detached.model_fields.keys())
        raise _unusable(f"wrong or missing: {', '.join(known) or 'no field, but there are others'}") from None


def _named_digest(manifest_bytes: bytes) -> str:
    """The model digest that a manifest names; whether that is true is for ``manifest`` and ``verify`` to check."""
    try:
        value = untrusted_json.load(manifest_bytes, most=MAX_MANIFEST_VALUES)
    except ValueError:
        value = None
    digest = value.get("digest") if isinstance(value, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _wrong("manifest.json names no model digest")
    return digest


def _read(path: Path, field: str, limit: int, *, refused_mode: int = 0) -> bytes:
    """The bytes of a regular file of bounded size."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_mode & refused_mode:
                mode = stat.S_IMODE(status.st_mode)
                raise _refusal(field, f"others can write to it (mode {mode:04o}); run `chmod go-w` on it")
            if status.st_size > limit:
                raise _refusal(field, f"it has {status.st_size} bytes; the limit is {limit}")
            return file.read(limit)
    except OSError as error:
        raise _refusal(field, f"it cannot be read ({error.strerror or type(error).__name__})") from None


def _refusal(field: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"--{field}: {problem}", field=field)


def _unusable(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"the signature cannot be used: {problem}", field=_FIELD)


def _wrong(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"the signature does not fit: {problem}", field=_FIELD)
