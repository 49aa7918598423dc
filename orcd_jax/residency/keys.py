"""The worker's own keys: one seals what it loaded, one signs what it says of itself.

Both are read from files that only their owner can use. Neither shows itself as text or leaves its process: what is done
with a key is a method of the key.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from orcd_jax.checkpoint.signature import PublicKey
from orcd_jax.config_files import others_can_use
from orcd_jax.errors import ErrorCode, OrcdError

SEAL_KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 4096


class _Kept:
    """What stays in its process: it has no text form, no copy and no pickle."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(not shown)"

    def __getstate__(self) -> NoReturn:  # where every copy and pickle begins
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled")


class SealKey(_Kept):
    """The key of the seal's HMAC-SHA256. Unrelated to the API token: whoever holds that one could make seals."""

    __slots__ = ("_secret",)

    def __init__(self) -> None:
        """A random key, for this process alone."""
        self._secret = secrets.token_bytes(SEAL_KEY_BYTES)

    @classmethod
    def load(cls, path: Path, *, field: str = "seal_key_file") -> SealKey:
        """Reads a key file: 64 hex digits, in a regular file that only its owner can use.

        Raises:
          OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
        """
        text = read_private(path, field).strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
            raise _refusal(field, "it must hold 64 hex digits and nothing else: make one with `openssl rand -hex 32`")
        key = cls()
        key._secret = bytes.fromhex(text.decode("ascii"))
        return key

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 of ``message``: 32 bytes."""
        return hmac.digest(self._secret, message, "sha256")


class IdentityKey(_Kept):
    """An Ed25519 key pair that signs. Its public half may be known to all."""

    __slots__ = ("_private",)

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    def __repr__(self) -> str:
        return f"IdentityKey({self.fingerprint})"

    @classmethod
    def load(cls, path: Path, *, field: str, follow_links: bool = True) -> IdentityKey:
        """Reads a key file: an Ed25519 private key as unencrypted PEM (PKCS #8), which only its owner can use.

        Args:
          path: the file.
          field: the flag that named it, for the error.
          follow_links: whether ``path`` may be a symbolic link.

        Raises:
          OrcdError: INVALID_PARAMS, saying what is wrong with the file and what to do.
        """
        private = read_private_key(path, field, follow_links=follow_links)
        if not isinstance(private, Ed25519PrivateKey):
            raise _refusal(field, "it holds a key of another kind; an Ed25519 private key is needed")
        return cls(private)

    @classmethod
    def load_or_create(cls, path: Path, *, field: str = "identity_key_file") -> IdentityKey:
        """Reads a key file, which is made first if there is none. Of those who make it at once, one wins for all.

        Raises:
          OrcdError: INVALID_PARAMS, saying what is wrong with the file or its folder and what to do.
        """
        if not os.path.lexists(path):
            try:
                write_private_key(path, Ed25519PrivateKey.generate())
            except FileExistsError:
                pass  # another worker was faster: its key is the one
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise _refusal(field, f"it cannot be made ({reason}): the worker must be able to write there") from None
        return cls.load(path, field=field, follow_links=False)

    @property
    def public_bytes(self) -> bytes:
        """The public half: 32 raw bytes."""
        return self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the key; as ``checkpoint.signature.PublicKey`` has it."""
        return PublicKey(self._private.public_key()).fingerprint

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of ``data``: 64 bytes, the same each time."""
        return self._private.sign(data)


def read_private(path: Path, field: str, *, follow_links: bool = True) -> bytes:
    """The bytes of a small regular file that only its owner can use.

    Raises:
      OrcdError: INVALID_PARAMS, naming the flag ``field``, saying what is wrong with the file and what to do.
    """
    # Without O_NONBLOCK a named pipe would hold the caller forever.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        opened = os.open(path, flags)
    except OSError as error:
        if not follow_links and path.is_symlink():
            raise _refusal(field, "it is a symbolic link; name the file itself") from None
        reason = error.strerror or type(error).__name__
        raise _refusal(field, f"it cannot be read ({reason}); it must be there, with mode 0600, and yours") from None
    try:
        # Of the open file, not of the path: nobody can exchange it in between.
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(field, "it is not a regular file")
        if others_can_use(opened):
            mode = stat.S_IMODE(status.st_mode)
            raise _refusal(field, f"others can use it (mode {mode:04o}); run `chmod 600` on it")
        if status.st_size > MAX_KEY_FILE_BYTES:
            raise _refusal(field, f"it has {status.st_size} bytes; the limit is {MAX_KEY_FILE_BYTES}")
        return os.read(opened, MAX_KEY_FILE_BYTES)
    finally:
        os.close(opened)


def read_private_key(path: Path, field: str, *, follow_links: bool = True) -> PrivateKeyTypes:
    """The private key, of whatever kind, in an unencrypted PEM file that only its owner can use.

    Raises:
      OrcdError: INVALID_PARAMS, naming the flag ``field``, saying what is wrong with the file and what to do.
    """
    pem = read_private(path, field, follow_links=follow_links)
    try:
        return load_pem_private_key(pem, password=None)
    except TypeError:
        raise _refusal(field, "it is encrypted; store it without a password, with mode 0600") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _refusal(field, "it is not a private key in PEM form (PKCS #8)") from None


def write_private_key(path: Path, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> None:
    """Writes a key as PEM (PKCS #8) to a new file of mode 0600, whole or not at all, and waits until it is on disk.

    Raises:
      FileExistsError: there is one already; it is left as it is.
      OSError: it cannot be written.
    """
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    opened = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(opened, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, it never replaces
    finally:
        part.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refusal(field: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"--{field}: {problem}", field=field)
