"""OpenSSF bundles: what the model_signing library makes with a key is accepted, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.checkpoint.bundle import CURVES, key_hint, sign_bundle
from orcd_jax.checkpoint.signature import PublicKey, SignedBy, verify_signature
from orcd_jax.errors import ErrorCode, OrcdError

MANIFEST = b'{"digest": "00"}'
PRIVATE = ec.generate_private_key(ec.SECP256R1())
TRUSTED = [PublicKey(ed25519.Ed25519PrivateKey.generate().public_key()), PublicKey(PRIVATE.public_key())]
SHA = hashlib.sha256(MANIFEST).hexdigest()


def statement(**changes: Any) -> dict[str, Any]:
    """What the library would sign over MANIFEST and another file."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": "00" * 32}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": "a", "algorithm": "sha256", "digest": "ab" * 32},
                {"name": "manifest.json", "algorithm": "sha256", "digest": SHA},
            ],
        },
        **changes,
    }


def with_resources(*resources: tuple[str, str, str]) -> dict[str, Any]:
    made = statement()
    made["predicate"]["resources"] = [dict(zip(("name", "algorithm", "digest"), it, strict=True)) for it in resources]
    return made


def serialized(**how: object) -> dict[str, Any]:
    made = statement()
    made["predicate"]["serialization"] = how
    return made


def sealed(said: object, key: ec.EllipticCurvePrivateKey = PRIVATE) -> dict[str, Any]:
    """A bundle of a statement, by hand: what the three formats' documents say."""
    payload = said if isinstance(said, bytes) else json.dumps(said).encode()
    kind = "application/vnd.in-toto+json"
    authenticated = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(pem).hexdigest()}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(key.sign(authenticated, ec.ECDSA(SHA256()))).decode()}],
        },
    }


def check(
    bundle: dict[str, Any] | bytes, trusted: list[PublicKey] | None = None, manifest: bytes = MANIFEST
) -> SignedBy:
    data = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
    return verify_signature(manifest, data, TRUSTED if trusted is None else trusted)


def refused(
    bundle: dict[str, Any] | bytes,
    code: ErrorCode,
    trusted: list[PublicKey] | None = None,
    manifest: bytes = MANIFEST,
) -> str:
    with pytest.raises(OrcdError) as caught:
        check(bundle, trusted, manifest)
    assert (caught.value.code, caught.value.field) == (code, "signature")
    assert caught.value.message.isprintable()
    return caught.value.message


# -- the library, as an independent peer -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "arrays").mkdir(parents=True)
    (directory / "manifest.json").write_bytes(MANIFEST)
    (directory / "arrays" / "data").write_bytes(bytes(range(256)))
    return directory


def write_pair(folder: Path, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def library() -> Any:
    """The library, which has no types where it is called."""
    return importlib.import_module("model_signing")


def library_signs(
    model: Path, private: Path, out: Path, hashing: Callable[[Any], Any] = lambda config: config
) -> bytes:
    """As the library's documentation says: its own interface, nothing of ours."""
    model_signing = library()
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=private)
    config.set_hashing_config(hashing(model_signing.hashing.Config())).sign(model, out)
    return out.read_bytes()


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: str(curve.name))
def test_a_bundle_of_the_library_passes(model: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    assert curve.name in CURVES
    bundle = library_signs(model, write_pair(tmp_path, key)[0], tmp_path / "model.sig")
    mine = PublicKey(key.public_key())
    assert check(bundle, [*TRUSTED, mine]) == SignedBy("openssf-bundle", mine.fingerprint)
    assert "another SHA-256" in refused(bundle, ErrorCode.MODEL_LOAD_FAILED, [mine], MANIFEST + b" ")
    assert key_hint(key.public_key()) in refused(bundle, ErrorCode.POLICY_VIOLATION)


@pytest.mark.requirement("WORKER-4314")
def test_the_library_accepts_a_bundle_of_ours_and_refuses_a_changed_file(model: Path, tmp_path: Path) -> None:
    model_signing = library()
    (model / ".gitignore").write_text("a file that the library leaves out by default\n")
    private, public = write_pair(tmp_path, PRIVATE)
    bundle = sign_bundle(model, private)
    assert check(bundle).kind == "openssf-bundle"
    (tmp_path / "model.sig").write_bytes(bundle)
    listed = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))["predicate"]["resources"]
    assert [entry["name"] for entry in listed] == [".gitignore", "arrays/data", "manifest.json"]
    everything = model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.set_hashing_config(everything).verify(model, tmp_path / "model.sig")
    (model / "arrays" / "data").write_bytes(bytes(256))
    with pytest.raises(ValueError, match="arrays/data"):
        verifier.verify(model, tmp_path / "model.sig")


@pytest.mark.requirement("WORKER-4314")
def test_a_bundle_that_was_made_in_the_directory_passes_from_outside_of_it(model: Path, tmp_path: Path) -> None:
    """The library leaves the signature itself out, by a path that it notes in the statement."""
    inside = model / "model.sig"
    bundle = library_signs(
        model, write_pair(tmp_path, PRIVATE)[0], inside, lambda config: config.set_ignored_paths(paths=[inside])
    )
    assert b"model.sig" in base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])
    assert check(bundle).kind == "openssf-bundle"


@pytest.mark.requirement("WORKER-4314")
def test_a_bundle_that_leaves_the_manifest_out_vouches_for_nothing(model: Path, tmp_path: Path) -> None:
    out = [model / "manifest.json"]
    private = write_pair(tmp_path, PRIVATE)[0]
    bundle = library_signs(model, private, tmp_path / "sig", lambda config: config.set_ignored_paths(paths=out))
    assert "manifest.json is not among" in refused(bundle, ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.parametrize(
    "hashing",
    [
        lambda config: config.use_shard_serialization(),
        lambda config: config.use_file_serialization(hashing_algorithm="blake3"),
        lambda config: config.use_file_serialization(hashing_algorithm="blake2"),
    ],
    ids=["shards", "blake3", "blake2"],
)
def test_another_way_of_hashing_is_named_as_one_that_is_not_known(
    model: Path, tmp_path: Path, hashing: Callable[[Any], Any]
) -> None:
    bundle = library_signs(model, write_pair(tmp_path, PRIVATE)[0], tmp_path / "sig", hashing)
    assert "whole files with SHA-256" in refused(bundle, ErrorCode.INVALID_PARAMS)


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
def test_signing_without_the_library_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OrcdError) as caught:
        sign_bundle(model, write_pair(tmp_path, PRIVATE)[0])
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert f"({missing} is missing): pip install 'orcd-jax[signing]'" in caught.value.message
    assert check(sealed(statement())).kind == "openssf-bundle"  # to verify, it is not needed


def test_a_model_that_the_library_refuses_is_a_typed_error(model: Path, tmp_path: Path) -> None:
    (model / "link").symlink_to("manifest.json")
    with pytest.raises(OrcdError, match="symlink") as caught:
        sign_bundle(model, write_pair(tmp_path, PRIVATE)[0])
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    shutil.rmtree(model)
    with pytest.raises(OrcdError):
        sign_bundle(model, tmp_path / "key.pem")


@pytest.mark.requirement("WORKER-4314")
def test_neither_signing_nor_verifying_opens_a_socket(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()  # so that what is tried is the use, not the import

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    check(sign_bundle(model, write_pair(tmp_path, PRIVATE)[0]))


# -- by hand: what an attacker could send ------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
def test_a_bundle_made_from_the_documents_passes() -> None:
    assert check(sealed(statement())) == SignedBy("openssf-bundle", TRUSTED[1].fingerprint)


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(data=st.data())
def test_a_change_of_any_byte_of_the_statement_is_refused(data: st.DataObject) -> None:
    bundle = sealed(statement())
    payload = bytearray(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    assert "changed after" in refused(bundle, ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(signature=st.binary(max_size=80))
def test_noise_is_no_signature_of_a_statement(signature: bytes) -> None:
    bundle = sealed(statement())
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    refused(bundle, ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.requirement("WORKER-4314")
def test_a_stranger_is_refused_even_under_a_trusted_hint() -> None:
    forged = sealed(statement(), ec.generate_private_key(ec.SECP256R1()))
    refused(forged, ErrorCode.POLICY_VIOLATION)
    forged["verificationMaterial"]["publicKey"]["hint"] = key_hint(PRIVATE.public_key())
    refused(forged, ErrorCode.MODEL_LOAD_FAILED)
    refused(sealed(statement()), ErrorCode.POLICY_VIOLATION, [TRUSTED[0]])


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize("material", ["certificate", "x509CertificateChain"])
def test_a_keyless_bundle_is_refused_with_what_to_do(material: str) -> None:
    bundle = sealed(statement())
    bundle["verificationMaterial"] = {material: {"rawBytes": "AAAA"}, "tlogEntries": [{"logIndex": "1"}]}
    message = refused(bundle, ErrorCode.INVALID_PARAMS)
    assert "certificate" in message
    assert "orcd sign --bundle" in message
    bundle["verificationMaterial"]["publicKey"] = {"hint": key_hint(PRIVATE.public_key())}
    refused(bundle, ErrorCode.INVALID_PARAMS)


def damage(path: str, value: object) -> dict[str, Any]:
    """A good bundle with one thing in it replaced; ``None`` removes it."""
    bundle: Any = sealed(statement())
    *way, last = path.split(".")
    inner = bundle
    for step in way:
        inner = inner[int(step)] if step.isdigit() else inner[step]
    inner[last] = value
    if value is None:
        del inner[last]
    return dict(bundle)


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.1"),
        ("mediaType", None),
        ("verificationMaterial", None),
        ("verificationMaterial", []),
        ("verificationMaterial.publicKey", None),
        ("verificationMaterial.publicKey.hint", None),
        ("verificationMaterial.publicKey.hint", "short"),
        ("dsseEnvelope", None),
        ("dsseEnvelope.payload", 7),
        ("dsseEnvelope.payload", "not base64!"),
        ("dsseEnvelope.payload", "é"),
        ("dsseEnvelope.payloadType", "text/plain"),
        ("dsseEnvelope.signatures", []),
        ("dsseEnvelope.signatures", [{"sig": "AAAA"}, {"sig": "AAAA"}]),
        ("dsseEnvelope.signatures.0.sig", None),
        ("dsseEnvelope.signatures.0.sig", "A"),
    ],
)
def test_a_bundle_of_another_form_is_refused_as_unreadable(path: str, value: object) -> None:
    refused(damage(path, value), ErrorCode.INVALID_PARAMS)


def test_base64_with_anything_between_is_refused() -> None:
    """A lenient reader would skip it, and see the same bundle in another text."""
    for way in (("payload",), ("signatures", 0, "sig")):
        bundle: Any = sealed(statement())
        inner = bundle["dsseEnvelope"]
        for step in way[:-1]:
            inner = inner[step]
        inner[way[-1]] = f"{inner[way[-1]][:4]}\n!{inner[way[-1]][4:]}"
        assert "not base64" in refused(bundle, ErrorCode.INVALID_PARAMS)


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", ErrorCode.INVALID_PARAMS),
        (b"[" * 100_000, ErrorCode.INVALID_PARAMS),
        (b"[]", ErrorCode.INVALID_PARAMS),
        (json.dumps(statement()).encode()[:-1] + b', "predicate": {}}', ErrorCode.INVALID_PARAMS),
        (json.dumps(statement()).replace('"name"', '"name": "x", "name"').encode(), ErrorCode.INVALID_PARAMS),
        (statement(_type="https://in-toto.io/Statement/v0.1"), ErrorCode.INVALID_PARAMS),
        (statement(predicateType="https://model_signing/Digests/v0.1"), ErrorCode.INVALID_PARAMS),
        (statement(predicate={}), ErrorCode.INVALID_PARAMS),
        (serialized(method="files", hash_type="blake2b"), ErrorCode.INVALID_PARAMS),
        (serialized(method="shards", hash_type="sha256"), ErrorCode.INVALID_PARAMS),
        (with_resources(), ErrorCode.MODEL_LOAD_FAILED),
        (with_resources(("a/manifest.json", "sha256", SHA)), ErrorCode.MODEL_LOAD_FAILED),
        (with_resources(("./manifest.json", "sha256", SHA)), ErrorCode.MODEL_LOAD_FAILED),
        (with_resources(("manifest.json", "blake3", SHA)), ErrorCode.MODEL_LOAD_FAILED),
        (with_resources(("manifest.json", "sha256", SHA.upper())), ErrorCode.MODEL_LOAD_FAILED),
        (with_resources(("manifest.json", "sha256", "")), ErrorCode.MODEL_LOAD_FAILED),
        (
            with_resources(("manifest.json", "sha256", SHA), ("manifest.json", "sha256", "00" * 32)),
            ErrorCode.MODEL_LOAD_FAILED,
        ),
    ],
)
def test_a_trusted_signature_over_something_else_is_refused(said: object, code: ErrorCode) -> None:
    refused(sealed(said), code)


def test_a_key_is_named_as_the_library_names_it(tmp_path: Path) -> None:
    _, public = write_pair(tmp_path, PRIVATE)
    key: PublicKeyTypes = PRIVATE.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key_hint(key) == hashlib.sha256(public.read_bytes()).hexdigest()
