"""What SIGHUP reads again: the tokens that let clients in, and the certificates that connections begin with."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from orcd_jax.errors import OrcdError
from orcd_jax.server.auth import Access
from orcd_jax.server.grpc_server import GuardedServer
from orcd_jax.server.tls import ServerTls, read_tls
from orcd_jax.telemetry.audit import Audit, AuditEvent
from orcd_jax.telemetry.log import EventCode, get_logger

TlsFiles = tuple[Path, Path, Path | None]
"""Certificate, key, and authorities of clients: the arguments of ``tls.read_tls``."""


class Credentials:
    """Owns what was read, and keeps a server to it. What cannot be read again, or is not as it must be, stays as it is.

    Attributes:
      access: the tokens.
    """

    def __init__(self, access: Access, tls_files: TlsFiles | None, audit: Audit) -> None:
        """Reads the TLS files. Raises what ``tls.read_tls`` does."""
        self.access = access
        self._tls_files, self._audit = tls_files, audit
        self._tls: ServerTls | None = None if tls_files is None else read_tls(*tls_files)
        self._server: GuardedServer | None = None

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What new connections begin with; None: they are not encrypted."""
        return None if self._tls is None else self._tls.context

    def keep(self, server: GuardedServer) -> None:
        """Tells ``server`` of every change from now on."""
        self._server = server
        server.tls = self.tls

    async def reload(self) -> None:
        """Reads every file again, and tells the log and the audit what came of it (WORKER-4201, 4920).

        Calls that came with a token that is gone are ended. Connections keep the certificates that they began with.
        """
        # On a thread: a slow disk, or a key that takes long to check, must not keep the loop from the streams.
        try:
            rotation = await asyncio.to_thread(self.access.reload)
        except OrcdError as error:
            self._refused("The token files were not read again, the old tokens stay", error)
        else:
            ended = 0 if self._server is None else self._server.revoke(rotation.went)
            came, went = ", ".join(rotation.came) or "none", ", ".join(rotation.went) or "none"
            human = f"The token files were read again: new {came}, gone {went}; {ended} running calls were ended."
            get_logger().info(EventCode.AUTH, human=human)
            self._audit.record(AuditEvent.TOKENS_ROTATED, reason=f"new {came}; gone {went}", count=ended)
        if self._tls_files is None:
            return
        try:
            tls = await asyncio.to_thread(read_tls, *self._tls_files)
        except OrcdError as error:
            self._refused("The TLS files were not read again, new connections get the old ones", error)
        else:
            self._exchange(tls)

    def _exchange(self, tls: ServerTls) -> None:
        if self._tls is not None and tls.digest == self._tls.digest:
            return
        self._tls = tls
        if self._server is not None:
            self._server.tls = tls.context
        what = f"certificate {tls.fingerprint[:16]}, valid until {tls.valid_until:%Y-%m-%d %H:%M} UTC"
        get_logger().info(EventCode.AUTH, human=f"The TLS files were read again: new connections get {what}.")
        self._audit.record(AuditEvent.TLS_ROTATED, digest=tls.fingerprint, reason=what)

    def _refused(self, what: str, error: OrcdError) -> None:
        get_logger().error(EventCode.AUTH, human=f"{what}: {error.message}", code=error.code.value, field=error.field)
        self._audit.record(AuditEvent.ROTATION_REFUSED, field=error.field, reason=error.message)
