"""A signature vouches for exactly one manifest, by exactly the keys that are trusted; detached ones."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orcd_jax.checkpoint.signature import (
    PublicKey,
    SignedBy,
    default_signature_path,
    load_public_keys,
    read_signature,
    sign_manifest,
    verify_signature,
)
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import IdentityKey

DIGEST = "ab" * 32
MANIFEST = json.dumps({"digest": DIGEST, "files": [{"path": "a", "sha256": "cd" * 32}]}).encode()
PRIVATE = ed25519.Ed25519PrivateKey.generate()
SIGNER = IdentityKey(PRIVATE)
TRUSTED = [PublicKey(PRIVATE.public_key())]
STRANGER = PublicKey(ed25519.Ed25519PrivateKey.generate().public_key())
SIGNATURE = sign_manifest(SIGNER, MANIFEST)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(sorted(json.loads(SIGNATURE)))


def refused(
    signature: bytes, code: ErrorCode, manifest: bytes = MANIFEST, trusted: list[PublicKey] | None = None
) -> str:
    with pytest.raises(OrcdError) as caught:
        verify_signature(manifest, signature, TRUSTED if trusted is None else trusted)
    assert (caught.value.code, caught.value.field) == (code, "signature")
    assert caught.value.message.isprintable()
    return caught.value.message


def edited(**changes: object) -> bytes:
    value: dict[str, Any] = {**json.loads(SIGNATURE), **changes}
    return json.dumps(value).encode()


# -- the format --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
def test_a_signature_can_be_checked_from_the_documents_with_cryptography_alone() -> None:
    said = json.loads(SIGNATURE)
    raw = PRIVATE.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    manifest_sha256 = hashlib.sha256(MANIFEST).hexdigest()
    assert said == {
        "format": "orcd-signature",
        "format_version": 1,
        "algorithm": "ed25519",
        "key": hashlib.sha256(raw).hexdigest()[:16],
        "manifest_sha256": manifest_sha256,
        "model_digest": DIGEST,
        "signature": said["signature"],
    }
    statement = f'{{"manifest_sha256":"{manifest_sha256}","model_digest":"{DIGEST}"}}'.encode()
    PRIVATE.public_key().verify(bytes.fromhex(said["signature"]), b"orcd-checkpoint-signature-v1\0" + statement)


@pytest.mark.requirement("WORKER-4314")
def test_a_signature_of_a_trusted_key_passes_and_says_whose_it_is() -> None:
    for trusted in (TRUSTED, [STRANGER, *TRUSTED], [*TRUSTED, STRANGER]):
        assert verify_signature(MANIFEST, SIGNATURE, trusted) == SignedBy("ed25519", SIGNER.fingerprint)
    assert TRUSTED[0].fingerprint == SIGNER.fingerprint


def test_it_lies_beside_the_directory_and_never_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "llama-3.1"
    directory.mkdir()
    assert default_signature_path(directory) == tmp_path / "llama-3.1.sig"
    assert default_signature_path(directory / "..") == tmp_path.with_name(f"{tmp_path.name}.sig")


# -- who signed what ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
def test_a_key_that_is_not_trusted_is_refused_by_policy_and_named() -> None:
    message = refused(SIGNATURE, ErrorCode.POLICY_VIOLATION, trusted=[STRANGER])
    assert SIGNER.fingerprint in message
    curve = PublicKey(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert "none of the 0 trusted" in refused(SIGNATURE, ErrorCode.POLICY_VIOLATION, trusted=[curve])


def test_without_trusted_keys_nothing_is_trusted() -> None:
    assert "--trusted_keys_file" in refused(SIGNATURE, ErrorCode.INVALID_PARAMS, trusted=[])


@pytest.mark.requirement("WORKER-4314")
def test_a_stranger_who_borrows_a_trusted_keys_name_is_refused() -> None:
    forged = {**json.loads(sign_manifest(IdentityKey(ed25519.Ed25519PrivateKey.generate()), MANIFEST))}
    forged["key"] = SIGNER.fingerprint
    refused(json.dumps(forged).encode(), ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(bit=st.integers(0, len(MANIFEST) * 8 - 1))
def test_one_flipped_bit_of_the_manifest_is_refused(bit: int) -> None:
    manifest = bytearray(MANIFEST)
    manifest[bit // 8] ^= 1 << bit % 8
    assert "another SHA-256" in refused(SIGNATURE, ErrorCode.MODEL_LOAD_FAILED, bytes(manifest))


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(bit=st.integers(0, len(SIGNATURE) * 8 - 1))
def test_one_flipped_bit_of_the_signature_file_is_refused(bit: int) -> None:
    signature = bytearray(SIGNATURE)
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(OrcdError) as caught:
        verify_signature(MANIFEST, bytes(signature), TRUSTED)
    assert caught.value.code in (ErrorCode.INVALID_PARAMS, ErrorCode.POLICY_VIOLATION, ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.requirement("WORKER-4314")
def test_another_model_under_an_edited_statement_is_refused() -> None:
    other = MANIFEST.replace(b"cd" * 32, b"ce" * 32)
    assert "changed after" in refused(
        edited(manifest_sha256=hashlib.sha256(other).hexdigest()), ErrorCode.MODEL_LOAD_FAILED, other
    )
    assert "changed after" in refused(edited(model_digest="ef" * 32), ErrorCode.MODEL_LOAD_FAILED)


def test_a_signer_who_names_another_digest_than_the_manifest_is_refused() -> None:
    statement = json.dumps(
        {"manifest_sha256": hashlib.sha256(MANIFEST).hexdigest(), "model_digest": "ef" * 32}, separators=(",", ":")
    )
    signature = SIGNER.sign(b"orcd-checkpoint-signature-v1\0" + statement.encode()).hex()
    message = refused(edited(model_digest="ef" * 32, signature=signature), ErrorCode.MODEL_LOAD_FAILED)
    assert "another model digest" in message


def test_what_the_key_signed_for_another_purpose_is_no_signature() -> None:
    statement = f'{{"manifest_sha256":"{hashlib.sha256(MANIFEST).hexdigest()}","model_digest":"{DIGEST}"}}'.encode()
    for domain in (b"", b"orcd-attestation-v1\0", b"orcd-checkpoint-signature-v1"):
        refused(edited(signature=SIGNER.sign(domain + statement).hex()), ErrorCode.MODEL_LOAD_FAILED)


@pytest.mark.parametrize("manifest", [b"", b"[]", b'{"digest": 7}', b'{"digest": "ab"}', b"{" * 100_000, b"\xff"])
def test_what_names_no_model_is_not_signed(manifest: bytes) -> None:
    with pytest.raises(OrcdError) as caught:
        sign_manifest(SIGNER, manifest)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED


# -- hostile signatures ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(signature=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_signature_is_refused_as_unreadable(signature: bytes) -> None:
    refused(signature, ErrorCode.INVALID_PARAMS)


@pytest.mark.requirement("WORKER-4314")
@settings(deadline=None)
@given(name=fields, value=json_values)
def test_any_field_of_another_form_is_refused(name: str, value: object) -> None:
    assume(value != json.loads(SIGNATURE)[name])
    refused(edited(**{name: value}), ErrorCode.INVALID_PARAMS)


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not an object"),
        (b"7" * 5000, "not JSON"),
        (SIGNATURE.replace(b'"key"', b'"more": [' + b"{}," * 600 + b'0], "key"'), "holds more than 1000 values"),
        (b"{}", "neither a detached signature"),
        (SIGNATURE[:-3], "not JSON"),
        (SIGNATURE.replace(b"{", b'{"key": "0123456789abcdef",', 1), "twice"),
        (edited(format_version=2), "format_version than 1"),
        (edited(format_version=True), "format_version"),
        (edited(format_version=1.0), "format_version"),
        (edited(algorithm="rsa"), "algorithm"),
        (edited(signature="ab" * 63), "signature"),
        (edited(more=1), "there are others"),
        (b" " * (4 * 1024 * 1024) + SIGNATURE, "the limit is 4194304"),
    ],
    ids=[
        "empty",
        "deep",
        "list",
        "number",
        "values",
        "object",
        "cut",
        "twice",
        "version",
        "true",
        "float",
        "algorithm",
        "short",
        "more",
        "large",
    ],
)
def test_an_unreadable_signature_says_what_is_wrong(signature: bytes, why: str) -> None:
    assert why in refused(signature, ErrorCode.INVALID_PARAMS)


@pytest.mark.requirement("WORKER-4222")
@pytest.mark.requirement("WORKER-4223")
def test_nothing_of_the_manifest_is_parsed_before_its_signature_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    loads = json.loads

    def note(data: str | bytes, **how: Any) -> object:
        parsed.append(data)
        return loads(data, **how)

    monkeypatch.setattr(json, "loads", note)
    refused(SIGNATURE, ErrorCode.MODEL_LOAD_FAILED, b"{" * 1000)
    refused(SIGNATURE, ErrorCode.POLICY_VIOLATION, trusted=[STRANGER])
    assert parsed == [SIGNATURE.decode()] * 2


@pytest.mark.parametrize("module", ["signature", "bundle"])
def test_a_client_verifies_without_jax_and_without_anything_that_knows_a_network(module: str) -> None:
    script = (
        f"import sys, orcd_jax.checkpoint.{module}\n"
        "sys.exit(bool({'jax', 'model_signing', 'sigstore', 'requests', 'http.client'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# -- trusted keys ------------------------------------------------------------------------------------------------------


def public_pem(key: Any) -> bytes:
    made: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return made


def keys_file(tmp_path: Path, content: bytes, mode: int = 0o644) -> Path:
    path = tmp_path / "trusted.pem"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def unusable(path: Path) -> str:
    with pytest.raises(OrcdError) as caught:
        load_public_keys(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "trusted_keys_file")
    assert caught.value.message.startswith("--trusted_keys_file: ")
    return caught.value.message


@pytest.mark.requirement("WORKER-4314")
def test_a_file_holds_several_keys_of_both_kinds_with_notes_for_people(tmp_path: Path) -> None:
    curves = [ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())]
    pems = [public_pem(PRIVATE), *map(public_pem, curves)]
    path = keys_file(tmp_path, b"# release team\n" + b"\n# and\n".join(pems) + b"# the end\n")
    loaded = load_public_keys(path)
    assert [key.key for key in loaded] == [load_pem_public_key(pem) for pem in pems]
    der = curves[0].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert loaded[1].fingerprint == hashlib.sha256(der).hexdigest()[:16]
    assert verify_signature(MANIFEST, SIGNATURE, loaded).fingerprint == SIGNER.fingerprint


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o602])
def test_a_list_of_trust_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    assert "chmod go-w" in unusable(keys_file(tmp_path, public_pem(PRIVATE), mode))


def private_pem() -> bytes:
    return PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: b"", "holds 0 PEM blocks"),
        (lambda: b"no key at all", "holds 0 PEM blocks"),
        (lambda: public_pem(PRIVATE) * 65, "holds 65 PEM blocks; put 1 to 64"),
        (lambda: public_pem(PRIVATE) + private_pem(), "block 2 is not a public key but a private key"),
        (lambda: public_pem(PRIVATE).replace(b"PUBLIC KEY", b"CERTIFICATE"), "block 1 is not a public key"),
        (lambda: public_pem(PRIVATE).replace(b"-----END", b"----END"), "block 1 is a damaged"),
        (lambda: public_pem(PRIVATE)[:40] + b"\n-----END PUBLIC KEY-----\n", "block 1 is a damaged"),
        (lambda: public_pem(rsa.generate_private_key(65537, 2048)), "another kind"),
        (lambda: public_pem(ed448.Ed448PrivateKey.generate()), "another kind"),
        (lambda: public_pem(ec.generate_private_key(ec.SECP256K1())), "another kind"),
        (lambda: public_pem(PRIVATE) + b"#" * 65_536, "the limit is 65536"),
    ],
    ids=[
        "empty", "text", "too many", "private", "certificate", "no end", "cut", "RSA", "Ed448", "K1", "large",
    ],
)  # fmt: skip
def test_a_file_with_anything_else_in_it_is_refused_whole(
    tmp_path: Path, content: Callable[[], bytes], why: str
) -> None:
    message = unusable(keys_file(tmp_path, content()))
    assert why in message
    assert private_pem().decode().splitlines()[1] not in message


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, why in (("pipe", "not a regular file"), ("folder", "not a regular file"), ("none", "No such file")):
        assert why in unusable(tmp_path / name)
        with pytest.raises(OrcdError, match=why) as caught:
            read_signature(tmp_path / name)
        assert caught.value.field == "signature_file"


def test_a_signature_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "sig").write_bytes(b" " * (4 * 1024 * 1024))
    assert len(read_signature(tmp_path / "sig")) == 4 * 1024 * 1024
    (tmp_path / "sig").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(OrcdError, match="the limit is 4194304"):
        read_signature(tmp_path / "sig")
