"""Keys: read only from files that nobody else can use, made once, and never shown."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import os
import pickle
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency import keys as keys_module
from orcd_jax.residency.keys import IdentityKey, SealKey, write_private_key

HEX_KEY = "0123456789abcdef" * 4
RACERS = 4


def private(path: Path, content: bytes | str, mode: int = 0o600) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def pem(key: object, encryption: KeySerializationEncryption | None = None) -> bytes:
    assert isinstance(key, Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load_seal_key(path: Path) -> object:
    return SealKey.load(path)


def load_identity(path: Path) -> object:
    return IdentityKey.load_or_create(path)


def load_signing_key(path: Path) -> object:
    return IdentityKey.load(path, field="key_file")


LOADERS: list[tuple[Callable[[Path], object], str]] = [
    (load_seal_key, "seal_key_file"),
    (load_identity, "identity_key_file"),
    (load_signing_key, "key_file"),
]
each_loader = pytest.mark.parametrize(("load", "flag"), LOADERS, ids=[flag for _, flag in LOADERS])


def refusal(load: Callable[[Path], object], path: Path, flag: str) -> str:
    with pytest.raises(OrcdError) as caught:
        load(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, flag)
    assert caught.value.message.startswith(f"--{flag}: ")
    return caught.value.message


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4120")
@each_loader
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601, 0o777])
def test_a_file_that_others_can_use_is_refused(
    tmp_path: Path, load: Callable[[Path], object], flag: str, mode: int
) -> None:
    content = HEX_KEY if flag == "seal_key_file" else pem(Ed25519PrivateKey.generate())
    path = private(tmp_path / "key", content)
    load(path)
    path.chmod(mode)
    assert f"mode {mode:04o}" in refusal(load, path, flag)
    assert "chmod 600" in refusal(load, path, flag)


@each_loader
def test_what_is_not_a_small_regular_file_is_refused_at_once(
    tmp_path: Path, load: Callable[[Path], object], flag: str
) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in refusal(load, tmp_path / "pipe", flag)
    (tmp_path / "folder").mkdir(0o700)
    assert "not a regular file" in refusal(load, tmp_path / "folder", flag)
    assert "4097 bytes; the limit is 4096" in refusal(load, private(tmp_path / "large", b"a" * 4097), flag)
    assert refusal(load, private(tmp_path / "empty", b""), flag)


def test_a_file_that_is_not_there_is_named_by_its_flag(tmp_path: Path) -> None:
    assert "No such file" in refusal(load_seal_key, tmp_path / "none", "seal_key_file")
    assert "No such file" in refusal(load_signing_key, tmp_path / "none", "key_file")
    assert "cannot be made (No such file" in refusal(load_identity, tmp_path / "no" / "folder", "identity_key_file")


# -- the seal key ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4120")
def test_a_seal_key_authenticates_with_hmac_sha256_of_its_file(tmp_path: Path) -> None:
    for text in (HEX_KEY, f"{HEX_KEY}\n", HEX_KEY.upper()):
        key = SealKey.load(private(tmp_path / "key", text))
        assert key.mac(b"message") == hmac.new(bytes.fromhex(HEX_KEY), b"message", hashlib.sha256).digest()


@pytest.mark.requirement("WORKER-4120")
def test_without_a_file_every_process_and_every_key_is_another() -> None:
    macs = {SealKey().mac(b"") for _ in range(16)}
    assert len(macs) == 16
    assert hmac.digest(bytes(32), b"", "sha256") not in macs


@pytest.mark.parametrize(
    "text", ["", HEX_KEY[:-1], f"{HEX_KEY}0", f"{HEX_KEY[:-1]}g", f"{HEX_KEY[:32]} {HEX_KEY[32:]}", f"{HEX_KEY}\n" * 2]
)
def test_what_is_not_64_hex_digits_is_no_seal_key_and_is_not_repeated(tmp_path: Path, text: str) -> None:
    message = refusal(load_seal_key, private(tmp_path / "key", text), "seal_key_file")
    assert "openssl rand -hex 32" in message
    assert HEX_KEY[:16] not in message


def test_a_seal_key_may_be_linked_as_secrets_are_mounted(tmp_path: Path) -> None:
    private(tmp_path / "key", HEX_KEY)
    (tmp_path / "link").symlink_to("key")
    assert SealKey.load(tmp_path / "link").mac(b"a") == SealKey.load(tmp_path / "key").mac(b"a")


# -- the identity ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4120")
def test_the_identity_is_made_at_the_first_start_and_stays(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = IdentityKey.load_or_create(tmp_path / "identity.pem")
    finally:
        os.umask(before)
    status = (tmp_path / "identity.pem").stat()
    assert (stat.S_ISREG(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o600)
    assert names(tmp_path) == ["identity.pem"]
    again = IdentityKey.load_or_create(tmp_path / "identity.pem")
    assert again.public_bytes == first.public_bytes
    assert first.fingerprint == hashlib.sha256(first.public_bytes).hexdigest()[:16]
    assert len(first.public_bytes) == 32


def test_the_identity_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        IdentityKey.load_or_create(tmp_path / "identity.pem")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600


@pytest.mark.requirement("WORKER-4120")
def test_anyone_can_check_its_signatures(tmp_path: Path) -> None:
    key = IdentityKey.load_or_create(tmp_path / "identity.pem")
    Ed25519PublicKey.from_public_bytes(key.public_bytes).verify(key.sign(b"data"), b"data")
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(key.public_bytes).verify(key.sign(b"data"), b"date")


RACE = """
import pathlib, sys
from orcd_jax.residency.keys import IdentityKey
print("ready", flush=True)
sys.stdin.readline()
print(IdentityKey.load_or_create(pathlib.Path(sys.argv[1])).public_bytes.hex(), flush=True)
"""


def test_processes_that_make_it_at_once_end_with_one_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    start = [sys.executable, "-c", RACE, str(path)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(start, stdin=pipe, stdout=pipe, encoding="ascii") for _ in range(RACERS)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    keys = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert keys == {IdentityKey.load_or_create(path).public_bytes.hex()}
    assert names(tmp_path) == ["key"]


def test_whoever_comes_second_takes_the_first_ones_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, winner = tmp_path / "key", Ed25519PrivateKey.generate()
    write = write_private_key

    def late(at: Path, key: Ed25519PrivateKey) -> None:
        write(at, winner)
        write(at, key)

    monkeypatch.setattr(keys_module, "write_private_key", late)
    mine = IdentityKey.load_or_create(path)
    assert mine.public_bytes == winner.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert names(tmp_path) == ["key"]


def test_many_threads_never_read_half_a_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            path = tmp_path / str(number)
            assert len(set(pool.map(lambda at: IdentityKey.load_or_create(at).public_bytes, [path] * 8))) == 1


def test_the_file_and_its_name_are_on_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def note_fsync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_link(source: Path, target: Path) -> None:
        done.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "link", note_link)
    IdentityKey.load_or_create(tmp_path / "key")
    assert done == ["file", "name", "folder"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refusal(load_identity, tmp_path / "key", "identity_key_file")
    assert names(tmp_path) == []


@pytest.mark.parametrize("target", ["key", "nowhere"])
def test_the_identity_is_not_read_or_made_through_a_link(tmp_path: Path, target: str) -> None:
    private(tmp_path / "key", pem(Ed25519PrivateKey.generate()))
    (tmp_path / "link").symlink_to(target)
    assert "symbolic link" in refusal(load_identity, tmp_path / "link", "identity_key_file")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: pem(ec.generate_private_key(ec.SECP256R1())), "another kind"),
        (lambda: pem(rsa.generate_private_key(65537, 2048)), "another kind"),
        (lambda: pem(x25519.X25519PrivateKey.generate()), "another kind"),
        (lambda: pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"secret")), "encrypted"),
        (lambda: pem(Ed25519PrivateKey.generate())[:-40], "not a private key"),
        (
            lambda: (
                Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            ),
            "not a private key",
        ),
        (lambda: b"\xff\0" * 64, "not a private key"),
    ],
    ids=["EC", "RSA", "X25519", "encrypted", "cut off", "public", "noise"],
)
def test_another_kind_of_key_is_refused_and_left_as_it_is(
    tmp_path: Path, content: Callable[[], bytes], why: str
) -> None:
    data = content()
    path = private(tmp_path / "key", data)
    assert why in refusal(load_identity, path, "identity_key_file")
    assert path.read_bytes() == data


# -- nothing shows them ------------------------------------------------------------------------------------------------


def _show_all(key: object) -> list[str]:
    shown = [repr(key), str(key), f"{key}", f"{key!a}", f"{[key]} { ({'key': key}) }", json.dumps(key, default=repr)]
    try:
        raise RuntimeError(key)
    except RuntimeError as error:
        shown += traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return shown


@pytest.mark.requirement("WORKER-4111")
def test_no_text_form_shows_a_key(tmp_path: Path) -> None:
    secret = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(HEX_KEY))
    identity = IdentityKey.load(private(tmp_path / "identity", pem(secret)), field="key_file")
    seal_key = SealKey.load(private(tmp_path / "seal", HEX_KEY))
    hidden = [HEX_KEY, repr(bytes.fromhex(HEX_KEY))[2:20], pem(secret).decode().splitlines()[1]]
    for key in (identity, seal_key):
        shown = "\n".join(_show_all(key))
        assert not [text for text in hidden if text in shown]
        assert not hasattr(key, "__dict__")
    assert repr(identity) == f"IdentityKey({identity.fingerprint})"


@pytest.mark.requirement("WORKER-4111")
@pytest.mark.parametrize("make", [SealKey, lambda: IdentityKey(Ed25519PrivateKey.generate())], ids=["seal", "identity"])
def test_a_key_cannot_be_pickled_or_copied(make: Callable[[], object]) -> None:
    key = make()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(key, protocol)
    for take in (copy.copy, copy.deepcopy, methodcaller("__getstate__"), methodcaller("__reduce__")):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            take(key)


@pytest.mark.parametrize("module", ["keys", "seal", "attestation"])
def test_a_client_can_use_them_without_jax(module: str) -> None:
    script = f"import sys, orcd_jax.residency.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
