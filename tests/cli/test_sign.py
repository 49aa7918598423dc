"""``orcd sign``, ``orcd verify`` and ``orcd keygen``: from a key to a checkpoint of which not one bit may change."""

from __future__ import annotations

import hashlib
import io
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.signature import PublicKey, SignedBy, load_public_keys, verify_signature
from orcd_jax.cli import sign
from orcd_jax.cli.sign import keygen, sign_checkpoint, verify_checkpoint
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.keys import write_private_key
from tests.checkpoint.tiny import MemorySource, convert, copied, list_files

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "signatures.md"
FLIPS_PER_FILE = 2
both_kinds = pytest.mark.parametrize("bundle", [False, True], ids=["detached", "bundle"])


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody writes into."""
    directory = tmp_path_factory.mktemp("converted") / "tiny"
    convert(MemorySource(), directory)
    return directory


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return copied(converted, tmp_path)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    keygen(tmp_path / "key", Output(io.StringIO()))
    return tmp_path / "key"


@pytest.fixture
def curve_key(tmp_path: Path) -> Path:
    keygen(tmp_path / "curve", Output(io.StringIO()), bundle=True)
    return tmp_path / "curve"


class Screen:
    """What was shown."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.output = Output(self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.text)
        assert isinstance(value, dict)
        return value


def pub(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def refused(
    code: ErrorCode, model: Path, signature_file: Path | None, public_key_file: Path | None, *, field: str | None = None
) -> str:
    """Why a call of verify_checkpoint is refused; nothing is shown before."""
    screen = Screen()
    with pytest.raises(OrcdError) as caught:
        verify_checkpoint(model, signature_file, public_key_file, screen.output)
    assert caught.value.code is code
    assert field is None or caught.value.field == field
    assert screen.text == ""
    return caught.value.message


# -- keygen ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
@both_kinds
def test_keygen_makes_a_pair_of_which_one_half_is_private(tmp_path: Path, bundle: bool) -> None:
    screen = Screen()
    assert keygen(tmp_path / "k", screen.output, bundle=bundle, as_json=True) is ExitCode.OK
    made = load_pem_private_key((tmp_path / "k").read_bytes(), None)
    assert isinstance(made, ec.EllipticCurvePrivateKey if bundle else Ed25519PrivateKey)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    [trusted] = load_public_keys(tmp_path / "k.pub")
    assert trusted.key == made.public_key()
    assert screen.json == {
        "kind": "ecdsa-p256" if bundle else "ed25519",
        "key": trusted.fingerprint,
        "private_key_file": str(tmp_path / "k"),
        "public_key_file": str(tmp_path / "k.pub"),
    }


@pytest.mark.requirement("WORKER-4111")
def test_keygen_shows_the_private_key_to_nobody(tmp_path: Path) -> None:
    for as_json in (False, True):
        screen = Screen()
        path = tmp_path / f"k{as_json}"
        keygen(path, screen.output, as_json=as_json)
        assert path.read_text().splitlines()[1] not in screen.text
        assert str(path) in screen.text


@pytest.mark.parametrize("there", ["k", "k.pub"])
def test_keygen_replaces_nothing(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(OrcdError, match="a key is never replaced") as caught:
        keygen(tmp_path / "k", Screen().output)
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {there: "mine"}


def test_keygen_says_when_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(OrcdError, match="--key_file: it cannot be written \\(No such file"):
        keygen(tmp_path / "no" / "k", Screen().output)


# -- sign, verify ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
@both_kinds
def test_what_is_signed_is_verified(model: Path, key: Path, curve_key: Path, bundle: bool) -> None:
    mine, signed, verified = curve_key if bundle else key, Screen(), Screen()
    assert sign_checkpoint(model, mine, None, signed.output, bundle=bundle, as_json=True) is ExitCode.OK
    assert verify_checkpoint(model, None, pub(mine), verified.output, as_json=True) is ExitCode.OK
    manifest = read_manifest(model)
    assert verified.json == {
        "model": manifest.model.model_id,
        "digest": manifest.digest,
        "files": len(manifest.files),
        "bytes": sum(entry.size_bytes for entry in manifest.files),
        "signature": {
            "kind": "openssf-bundle" if bundle else "ed25519",
            "key": load_public_keys(pub(mine))[0].fingerprint,
        },
        "origin_proved": True,
    }
    beside = model.with_name(f"{model.name}.sig")
    assert signed.json == {**verified.json, "signature_file": str(beside)}
    assert beside.is_file()
    verify_checkpoint(model, beside, pub(mine), Screen().output)


@pytest.mark.requirement("WORKER-4314")
def test_the_lines_in_the_documentation_verify_a_detached_signature(
    model: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text.partition("    said = json")[2].partition("\n\n")[0].splitlines()
    code = "\n".join(["said = json" + lines[0], *(line.removeprefix("    ") for line in lines[1:])])
    model.rename(tmp_path / "model")
    sign_checkpoint(tmp_path / "model", key, None, Screen().output)
    monkeypatch.chdir(tmp_path)
    names = {"json": json, "hashlib": hashlib, "Path": Path, "public_key": load_public_keys(pub(key))[0].key}
    exec(code, names)
    assert names["said"] == json.loads((tmp_path / "model.sig").read_bytes())
    said = (tmp_path / "model.sig").read_text()
    (tmp_path / "model.sig").write_text(said.replace('"model_digest": "', '"model_digest": "0'))
    with pytest.raises(InvalidSignature):
        exec(code, names)


@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4314")
@both_kinds
def test_one_flipped_bit_in_any_file_is_refused(model: Path, key: Path, curve_key: Path, bundle: bool) -> None:
    mine = curve_key if bundle else key
    sign_checkpoint(model, mine, None, Screen().output, bundle=bundle)
    rng = np.random.default_rng(4314)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        for bit in rng.integers(0, len(whole) * 8, FLIPS_PER_FILE):
            raw = bytearray(whole)
            raw[bit // 8] ^= 1 << bit % 8
            path.write_bytes(raw)
            message = refused(ErrorCode.MODEL_LOAD_FAILED, model, None, pub(mine))
            assert path.name in message
        path.write_bytes(whole)
    verify_checkpoint(model, None, pub(mine), Screen().output)


@pytest.mark.requirement("WORKER-4314")
@both_kinds
def test_files_with_a_manifest_made_to_fit_them_are_refused(
    model: Path, key: Path, curve_key: Path, bundle: bool
) -> None:
    mine = curve_key if bundle else key
    sign_checkpoint(model, mine, None, Screen().output, bundle=bundle)
    (model / "tokenizer.json").write_text('{"model": "other"}')
    list_files(model)
    verify_checkpoint(model, None, None, Screen().output)  # whole, but by whom?
    assert "signature" in refused(ErrorCode.MODEL_LOAD_FAILED, model, None, pub(mine), field="signature")


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize("change", ["more", "less"])
def test_a_file_more_or_less_is_refused(model: Path, key: Path, change: str) -> None:
    sign_checkpoint(model, key, None, Screen().output)
    if change == "more":
        (model / "arrays" / "more").write_bytes(b"")
    else:
        (model / "tokenizer.json").unlink()
    refused(ErrorCode.MODEL_LOAD_FAILED, model, None, pub(key), field="model_path")


@pytest.mark.requirement("WORKER-4314")
def test_a_signature_by_another_key_is_refused_by_policy(model: Path, key: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "other", Screen().output)
    sign_checkpoint(model, tmp_path / "other", None, Screen().output)
    refused(ErrorCode.POLICY_VIOLATION, model, None, pub(key))


def test_without_a_signature_only_the_files_are_checked_and_that_is_said(model: Path) -> None:
    shown, as_json = Screen(), Screen()
    assert verify_checkpoint(model, None, None, shown.output) is ExitCode.OK
    assert "proves nothing about where they come from" in shown.text
    verify_checkpoint(model, None, None, as_json.output, as_json=True)
    assert (as_json.json["signature"], as_json.json["origin_proved"]) == (None, False)
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(ErrorCode.MODEL_LOAD_FAILED, model, None, None)


def test_a_signature_is_never_taken_for_checked_without_a_key(model: Path, key: Path) -> None:
    sign_checkpoint(model, key, None, Screen().output)
    beside = model.with_name(f"{model.name}.sig")
    refused(ErrorCode.INVALID_PARAMS, model, beside, None, field="public_key_file")
    beside.unlink()
    assert "No such file" in refused(ErrorCode.INVALID_PARAMS, model, None, pub(key), field="signature_file")


@pytest.mark.requirement("WORKER-4222")
@pytest.mark.requirement("WORKER-4223")
def test_the_signature_is_checked_before_anything_of_the_model_is_read(
    model: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keygen(tmp_path / "other", Screen().output)
    sign_checkpoint(model, key, None, Screen().output)

    def refuse(_: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(sign, "parse_manifest", refuse)
    refused(ErrorCode.POLICY_VIOLATION, model, None, pub(tmp_path / "other"))
    (model / "manifest.json").write_text("{")
    refused(ErrorCode.MODEL_LOAD_FAILED, model, None, pub(key), field="signature")


@both_kinds
def test_a_damaged_checkpoint_is_not_signed(model: Path, key: Path, curve_key: Path, bundle: bool) -> None:
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(OrcdError, match=r"tokenizer\.json"):
        sign_checkpoint(model, curve_key if bundle else key, None, Screen().output, bundle=bundle)
    assert not model.with_name(f"{model.name}.sig").exists()


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, key: Path) -> None:
    with pytest.raises(OrcdError, match="not a converted checkpoint"):
        sign_checkpoint(tmp_path, key, tmp_path.with_name("out.sig"), Screen().output)
    assert "not a converted checkpoint" in refused(ErrorCode.MODEL_LOAD_FAILED, tmp_path, None, None)


def test_what_is_parsed_is_what_was_signed(model: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that is exchanged after its signature was checked is never read."""
    sign_checkpoint(model, key, None, Screen().output)
    verified = Screen()

    def exchange(raw: bytes, signature: bytes, trusted: Sequence[PublicKey]) -> SignedBy:
        by = verify_signature(raw, signature, trusted)
        (model / "manifest.json").write_text("{}")
        return by

    monkeypatch.setattr(sign, "verify_signature", exchange)
    assert verify_checkpoint(model, None, pub(key), verified.output) is ExitCode.OK
    assert "good, by key" in verified.text


def test_a_signature_within_the_checkpoint_is_not_written(model: Path, key: Path) -> None:
    for out in (model / "model.sig", model / "arrays" / ".." / "model.sig", model):
        with pytest.raises(OrcdError, match="--out: it lies in the checkpoint"):
            sign_checkpoint(model, key, out, Screen().output)


@both_kinds
def test_the_wrong_kind_of_key_is_named_before_any_work(model: Path, key: Path, curve_key: Path, bundle: bool) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(OrcdError, match="--key_file: ") as caught:
        sign_checkpoint(model, key if bundle else curve_key, None, Screen().output, bundle=bundle)
    assert ("orcd keygen --bundle" if bundle else "Ed25519") in caught.value.message


def test_a_curve_that_bundles_do_not_have_is_named(model: Path, tmp_path: Path) -> None:
    write_private_key(tmp_path / "k1", ec.generate_private_key(ec.SECP256K1()))
    with pytest.raises(OrcdError, match="secp256r1, secp384r1, secp521r1") as caught:
        sign_checkpoint(model, tmp_path / "k1", None, Screen().output, bundle=True)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "key_file")


def test_signing_again_replaces_the_signature_whole(model: Path, key: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sig"
    out.write_text("old")
    with out.open() as reader:
        sign_checkpoint(model, key, out, Screen().output)
        assert reader.read() == "old"  # who reads meanwhile has one or the other
    verify_checkpoint(model, out, pub(key), Screen().output)
    assert stat.S_IMODE(out.stat().st_mode) & 0o444 == 0o444
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    with pytest.raises(OrcdError, match=r"--out: x\.sig cannot be written \(No such file"):
        sign_checkpoint(model, key, tmp_path / "no" / "x.sig", Screen().output)


def test_a_person_reads_a_table(model: Path, key: Path) -> None:
    signed, verified = Screen(), Screen()
    sign_checkpoint(model, key, None, signed.output)
    verify_checkpoint(model, None, pub(key), verified.output)
    for screen, more in ((verified, []), (signed, ["written"])):
        names = [line.split()[0] for line in screen.text.splitlines()]
        assert names == ["model", "digest", "files", "signature", *more]
    assert f"good, by key {load_public_keys(pub(key))[0].fingerprint} (detached, Ed25519)" in verified.text


def test_progress_is_told_while_files_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal as a bar, on stderr; nowhere else at all."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    verify_checkpoint(model, None, None, Screen().output)
    assert "checking the files" in shown.getvalue()
    monkeypatch.setenv("FORCE_COLOR", "")
    quiet = io.StringIO()
    monkeypatch.setattr("sys.stderr", quiet)
    verify_checkpoint(model, None, None, Screen().output)
    assert quiet.getvalue() == ""
