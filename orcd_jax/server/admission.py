"""Who may call what: the roles of every method, and the door that asks for them (WORKER-4200)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.auth import TOKEN_FLAGS, Access, Identity, Role
from orcd_jax.server.codec import PACKAGE
from orcd_jax.server.limits import AuthFailures, Clock, Limits

_WORKER = f"/{PACKAGE}.Worker"
READY, EXECUTE = f"{_WORKER}/Ready", f"{_WORKER}/Execute"

# Supervisors probe liveness before they have a token. Nothing else is open.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})

_CONTROL, _EXECUTE = frozenset({Role.CONTROL}), frozenset({Role.EXECUTE})
_EITHER = _CONTROL | _EXECUTE

METHOD_ROLES: Mapping[str, frozenset[Role]] = {
    f"{_WORKER}/Plan": _CONTROL,
    f"{_WORKER}/Commit": _CONTROL,
    f"{_WORKER}/Attest": _CONTROL,
    f"{_WORKER}/GetStatus": _CONTROL,
    f"{_WORKER}/Drain": _CONTROL,
    f"{_WORKER}/Shutdown": _CONTROL,
    EXECUTE: _EXECUTE,
    f"{_WORKER}/Cancel": _EXECUTE,
    f"{_WORKER}/GetReceipt": _EXECUTE,
    f"{_WORKER}/Tokenize": _EXECUTE,
    f"{_WORKER}/Detokenize": _EXECUTE,
    READY: _EITHER,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _EITHER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EITHER,
}
"""Any one of a method's roles opens it."""


def roles_for(path: str) -> frozenset[Role]:
    """The roles that open a method; one that nobody thought of is for control only."""
    return METHOD_ROLES.get(path, _CONTROL)


class AuthResult(enum.StrEnum):
    """How an authentication went."""

    OK = "ok"
    FAILED = "failed"  # no token, or not one of ours
    LIMITED = "limited"  # too many failures of this address: refused unseen, or another one
    FORBIDDEN = "forbidden"  # a token of the wrong role


@dataclass(frozen=True, slots=True)
class AuthOutcome:
    """One authentication, for the audit and for metrics.

    Attributes:
      result: how it went.
      method: path of the method, as the client wrote it.
      peer: address of the client, without its port.
      fingerprint: of the token; empty when it is not one of ours.
      correlation_id: of the call.
    """

    result: AuthResult
    method: str
    peer: str
    fingerprint: str
    correlation_id: str


class Standing:
    """What is known of one connection's client.

    Attributes:
      trusted: whether its next token is looked at however often its address failed. So is the first of a connection,
        and one after a good one: nobody is locked out by a neighbour, and a guess beyond the limit costs a connection.
      fingerprint: of the last good token; empty: there was none, or it was taken away.
    """

    __slots__ = ("fingerprint", "trusted")

    def __init__(self) -> None:
        """A client that has not tried yet."""
        self.trusted, self.fingerprint = True, ""

    def revoke(self, fingerprints: Container[str]) -> None:
        """Forgets a good token that is none any more."""
        if self.fingerprint in fingerprints:
            self.trusted, self.fingerprint = False, ""


class Door:
    """Lets in who has a token of a fitting role. Owns the count of failures of each address."""

    def __init__(
        self, access: Access, limits: Limits, on_auth: Callable[[AuthOutcome], None] | None = None, *, clock: Clock
    ) -> None:
        """Asks ``access``; tells ``on_auth`` of every outcome."""
        self._access, self._on_auth = access, on_auth
        self._failures = AuthFailures(limits, clock)

    def admit(
        self,
        authorization: Sequence[object],
        roles: frozenset[Role],
        *,
        method: str,
        peer: str,
        standing: Standing,
        correlation_id: str,
    ) -> Identity:
        """Who calls, if that is one who may.

        Raises:
          OrcdError: AUTH_FAILED: no valid token. BUSY: too many failures of this address, and the token was not looked
            at. POLICY_VIOLATION: a valid token without any of ``roles``.
        """

        def tell(result: AuthResult, fingerprint: str = "") -> None:
            if self._on_auth is not None:
                self._on_auth(AuthOutcome(result, method, peer, fingerprint, correlation_id))

        wait_ms = 0 if standing.trusted else self._failures.wait_ms(peer)
        if wait_ms:
            tell(AuthResult.LIMITED)
            raise OrcdError(
                ErrorCode.BUSY,
                "too many calls without a valid token came from this address: try again later",
                retry_after_ms=wait_ms,
            )
        try:
            identity = self._access.authenticate(authorization)
        except OrcdError:
            standing.trusted = False
            tell(AuthResult.FAILED if self._failures.note(peer) else AuthResult.LIMITED)
            raise
        standing.trusted, standing.fingerprint = True, identity.fingerprint
        if not identity.roles & roles:
            tell(AuthResult.FORBIDDEN, identity.fingerprint)
            raise self._forbidden(method, identity, roles)
        tell(AuthResult.OK, identity.fingerprint)
        return identity

    def _forbidden(self, method: str, identity: Identity, roles: frozenset[Role]) -> OrcdError:
        name, needed = method.rpartition("/")[2], " or ".join(sorted(roles))
        problem = f"{name} is for the {needed} role; this token is for {' and '.join(sorted(identity.roles))}"
        if roles & self._access.roles:
            advice = f"use a token of {' or '.join(f'--{TOKEN_FLAGS[role]}' for role in sorted(roles))}"
        else:
            advice = "the worker was started without --control_token_file, so nobody can call it"
        return OrcdError(ErrorCode.POLICY_VIOLATION, f"{problem}: {advice}")
