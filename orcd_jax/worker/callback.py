"""Telling the pool manager that the worker is ready, or why it is not (WORKER-4023).

One POST of a JSON object, retried with jittered exponential backoff until a deadline. The request goes to the
configured URL and nowhere else: redirects are refused, proxies of the environment are not used. Whatever the other side
does, or does not, nobody waits for it longer than was said.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from urllib.parse import SplitResult, urlsplit, urlunsplit

from orcd_jax import __version__
from orcd_jax.errors import ErrorCode, OrcdError

ATTEMPT_TIMEOUT_S = 5.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0

Sleep = Callable[[float], Awaitable[None]]
OnRetry = Callable[[int, str, float], None]


class CallbackUndelivered(OrcdError):
    """The pool manager did not take the message in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """The body of a readiness callback.

    Attributes:
      model_ref: what was loaded.
      handle_id: of the sealed handle.
      digest: model digest, 64 hex digits.
      pinned: whether the digest was given from outside.
      vram_bytes: device memory held; 0 when emulated.
      emulated: the CPU backend stands in for a GPU.
      uri: where the worker takes jobs, such as ``grpc://127.0.0.1:50051``; ``grpcs`` with TLS.
      metrics_port: loopback port of the metrics; 0: none.
      identity_public_key: Ed25519, 64 hex digits: checks what the worker signs.
      capabilities: the worker's ECP.
    """

    worker_id: str
    pool_id: str
    model_ref: str
    handle_id: str
    digest: str
    pinned: bool
    vram_bytes: int
    emulated: bool
    uri: str
    metrics_port: int
    identity_public_key: str
    capabilities: dict[str, object] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON that is sent."""
        return _encode({"status": "ready", **asdict(self), "version": __version__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The body of a failure callback.

    Attributes:
      code: a stable error code.
      message: one sentence, safe to show.
      retriable: whether starting this worker again may help.
      exit_code: by which the process ends.
      retry_after_ms: before which it does not start again; None: nothing keeps it from it.
    """

    worker_id: str
    pool_id: str
    code: str
    message: str
    retriable: bool
    exit_code: int
    retry_after_ms: int | None = None

    def body(self) -> bytes:
        """The JSON that is sent."""
        return _encode({"status": "failed", **asdict(self), "version": __version__})


async def deliver(
    url: str,
    message: Readiness | Failure,
    *,
    deadline_s: float,
    token: str = "",
    on_retry: OnRetry | None = None,
    sleep: Sleep = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
    jitter: Callable[[], float] = random.random,
) -> int:
    """POSTs ``message`` until it is taken (any 2xx status).

    Args:
      url: http or https; https is verified against the system's certificates.
      message: what to say.
      deadline_s: seconds after which no further attempt is begun, and one that runs is given up.
      token: bearer token the pool manager wants; empty: none is sent.
      on_retry: called with the attempt, why it failed and the seconds until the next.
      sleep: waits, on the event loop.
      clock: monotonic seconds.
      jitter: a number in [0, 1): attempts of many workers spread over half of each wait.

    Returns:
      How many attempts it took.

    Raises:
      CallbackUndelivered: the deadline passed, or the URL is neither http nor https.
    """
    to = urlsplit(url)
    if to.scheme not in ("http", "https"):
        raise CallbackUndelivered(ErrorCode.INVALID_PARAMS, "the callback URL must begin with http:// or https://")
    body, end = message.body(), clock() + deadline_s
    verified = ssl.create_default_context() if to.scheme == "https" else None
    attempt, wait = 0, FIRST_WAIT_S
    while True:
        attempt += 1
        timeout_s = max(0.1, min(ATTEMPT_TIMEOUT_S, end - clock()))
        reason = await _Attempt(to, body, token, verified).outcome(timeout_s)
        if not reason:
            return attempt
        pause = wait * (0.5 + 0.5 * jitter())
        wait = min(2 * wait, LONGEST_WAIT_S)
        if clock() + pause >= end:
            raise CallbackUndelivered(
                ErrorCode.TIMEOUT,
                f"the pool manager did not take the callback in {attempt} attempts within {deadline_s:g} s ({reason}): "
                "check --readiness_callback_url and that the pool manager is up, or raise --callback_deadline",
                field="readiness_callback_url",
            )
        if on_retry is not None:
            on_retry(attempt, reason, pause)
        await sleep(pause)


class _Attempt:
    """One POST.

    A socket's timeout is for each of its operations, and names are looked up without any. So a thread does it, which
    nobody waits for longer than was said, nor at the end of the process; and which is not one of the few that the loop
    has for other work.
    """

    def __init__(self, to: SplitResult, body: bytes, token: str, verified: ssl.SSLContext | None) -> None:
        """Nothing is sent yet; ``verified``: with ``https``, how the other side is checked."""
        self._to, self._body, self._verified = to, body, verified
        self._headers = {"Content-Type": "application/json", "User-Agent": "orcd-jax"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._connection: http.client.HTTPConnection | None = None
        self._given_up = threading.Event()

    async def outcome(self, timeout_s: float) -> str:
        """Empty when it was taken, else a short reason without the server's own words."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()

        def settle(reason: str) -> None:
            if not done.done():
                done.set_result(reason)

        def run() -> None:
            reason = self._post(timeout_s)
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(settle, reason)

        threading.Thread(target=run, name="callback", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError:
            return _silent(timeout_s)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """What nobody waits for any more must not arrive after what is said next."""
        self._given_up.set()
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it ended by itself
                sock.shutdown(socket.SHUT_RDWR)

    def _post(self, timeout_s: float) -> str:
        """Runs on the thread, and raises nothing."""
        try:
            connection = self._connection = self._open(timeout_s)
            with contextlib.closing(connection):
                connection.connect()
                if self._given_up.is_set():
                    return _silent(timeout_s)
                target = urlunsplit(("", "", self._to.path or "/", self._to.query, ""))
                connection.request("POST", target, self._body, self._headers)
                status = connection.getresponse().status  # a redirect is an answer like another
        except TimeoutError:
            return _silent(timeout_s)
        except OSError as error:
            return error.strerror or type(error).__name__
        except Exception as error:  # what it says may hold the token
            return type(error).__name__
        if 200 <= status < 300:
            return ""
        return f"HTTP {status}" + (", a redirect, which is refused" if 300 <= status < 400 else "")

    def _open(self, timeout_s: float) -> http.client.HTTPConnection:
        host, port = self._to.hostname or "", self._to.port
        if self._verified is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._verified)


def _silent(timeout_s: float) -> str:
    return f"no answer within {timeout_s:.0f} s"


def _encode(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
