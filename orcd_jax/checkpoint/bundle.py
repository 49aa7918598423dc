"""OpenSSF model-signing bundles (``model.sig``), made and verified with a key; never with the network.

A bundle is a Sigstore bundle v0.3 in JSON around a DSSE envelope around an in-toto statement that lists every file of a
model with its SHA-256. Verified here is the one that matters, ``manifest.json``, which holds those of all others: so no
weight is read twice, and what decides is a page of code on ``cryptography``. Bundles are made by the ``model_signing``
library, whose import brings HTTP clients along that a worker has no use for.

Formats: https://github.com/sigstore/protobuf-specs (bundle), https://github.com/secure-systems-lab/dsse (envelope),
https://github.com/ossf/model-signing-spec (statement).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from orcd_jax.checkpoint import untrusted_json
from orcd_jax.checkpoint.manifest import MANIFEST_FILE, Sha256
from orcd_jax.errors import ErrorCode, OrcdError

CURVES: dict[str, type[SHA256 | SHA384 | SHA512]] = {"secp256r1": SHA256, "secp384r1": SHA384, "secp521r1": SHA512}
"""The curves of the format, by their names in SEC 2, and the hash that goes with each."""

MAX_STATEMENT_VALUES = 1_000_000
"""Of the statement that a trusted key signed: four for each file of a model."""

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_CERTIFICATES = frozenset({"certificate", "x509CertificateChain"})
_FIELD = "signature"


class _Camel(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, alias_generator=to_camel)


class _KeyHint(_Camel):
    hint: Sha256


class _Material(_Camel):
    public_key: _KeyHint


class _Signature(_Camel):
    sig: str


class _Envelope(_Camel):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


class _Bundle(_Camel):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _Material
    dsse_envelope: _Envelope


class _Resource(BaseModel):
    name: str
    algorithm: str
    digest: str


class _Serialization(BaseModel):
    method: str
    hash_type: str


class _Predicate(BaseModel):
    serialization: _Serialization
    resources: list[_Resource]


class _Statement(_Camel):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


def key_hint(key: EllipticCurvePublicKey) -> str:
    """What names a key in a bundle: SHA-256 of its PEM form, in hex."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def verify_bundle(
    value: Mapping[str, object], trusted: Mapping[str, EllipticCurvePublicKey], manifest_sha256: str
) -> str:
    """Checks that a trusted key signed a list of files in which ``manifest.json`` has this SHA-256.

    Args:
      value: the bundle, parsed as JSON.
      trusted: keys on curves of ``CURVES``, by their hints.
      manifest_sha256: 64 hex digits.

    Returns:
      The hint of the key.

    Raises:
      OrcdError: as :func:`orcd_jax.checkpoint.signature.verify_signature`.
    """
    material = value.get("verificationMaterial")
    if isinstance(material, dict) and not _CERTIFICATES.isdisjoint(material):
        raise _unusable(
            "it was made with a certificate (Sigstore keyless signing), and no network is asked here: sign with a key, "
            "by `orcd sign --bundle` or `model_signing sign key`"
        )
    try:
        bundle = _Bundle.model_validate(value)
        envelope = bundle.dsse_envelope
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except ValidationError as error:
        raise _unusable(f"it is not a bundle of model-signing 1.x: {_first(error)}") from None
    except (binascii.Error, ValueError):
        raise _unusable("it holds text that is not base64") from None
    hint = bundle.verification_material.public_key.hint
    key = trusted.get(hint)
    if key is None:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION,
            f"the model is signed with the key of hint {hint}, which is none of the {len(trusted)} trusted keys for "
            "bundles: trust that key, or have the model signed with one of yours",
            field=_FIELD,
        )
    try:
        key.verify(signature, _authenticated(payload), ECDSA(CURVES[key.curve.name]()))
    except InvalidSignature:
        raise _wrong("it was changed after it was made") from None
    if _listed_manifest(payload) != manifest_sha256:
        raise _wrong("it is of another model: manifest.json has another SHA-256")
    return hint


def sign_bundle(directory: Path, key_file: Path) -> bytes:
    """Signs a checkpoint with the ``model_signing`` library, which hashes every file.

    Args:
      directory: the checkpoint. No file in it is left out.
      key_file: PEM file of an unencrypted private key on a curve of ``CURVES``.

    Raises:
      OrcdError: INVALID_PARAMS, when the library cannot be imported; MODEL_LOAD_FAILED, when it refuses the model.
    """
    try:
        library = importlib.import_module("model_signing")
    except ImportError as error:
        raise OrcdError(
            ErrorCode.INVALID_PARAMS,
            f"--bundle needs the package model-signing, which cannot be imported ({error.name} is missing): "
            "pip install 'orcd-jax[signing]'",
            field="bundle",
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.sig"
        everything = library.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
        try:
            signer = library.signing.Config().use_elliptic_key_signer(private_key=key_file)
            signer.set_hashing_config(everything).sign(directory, made)
        except (OSError, ValueError) as error:
            raise OrcdError(
                ErrorCode.MODEL_LOAD_FAILED, f"model-signing cannot sign this model: {error}", field="model_path"
            ) from None
        return made.read_bytes()


def _authenticated(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _listed_manifest(payload: bytes) -> str:
    """The SHA-256 that a signed statement gives manifest.json."""
    try:
        predicate = _Statement.model_validate(untrusted_json.load(payload, most=MAX_STATEMENT_VALUES)).predicate
    except ValidationError as error:
        raise _unusable(f"its statement is not one of model-signing 1.x: {_first(error)}") from None
    except ValueError:
        raise _unusable("its statement is not JSON, or names a field twice") from None
    how = (predicate.serialization.method, predicate.serialization.hash_type)
    if how != ("files", "sha256"):
        raise _unusable("it was not made over whole files with SHA-256, the default of model-signing: sign again so")
    found = [entry for entry in predicate.resources if entry.name == MANIFEST_FILE]
    if len(found) != 1 or found[0].algorithm != "sha256":
        raise _wrong("manifest.json is not among the files it is of: sign the whole directory")
    return found[0].digest


def _first(error: ValidationError) -> str:
    """Where a bundle is wrong, in names of ours; nothing of what it holds."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {first['msg']}"


def _unusable(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"the signature cannot be used: {problem}", field=_FIELD)


def _wrong(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"the signature does not fit: {problem}", field=_FIELD)
