"""Telling the pool manager that the worker is ready, or why it is not (WORKER-4023).

One POST of a JSON object, retried with jittered exponential backoff until a deadline. The request goes to the
configured URL and nowhere else: redirects are refused, proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from email.message import Message
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

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
    """

    worker_id: str
    pool_id: str
    code: str
    message: str
    retriable: bool

    def body(self) -> bytes:
        """The JSON that is sent."""
        return _encode({"status": "failed", **asdict(self), "version": __version__})


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would send the worker's identity to an address nobody configured."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        raise HTTPError(req.full_url, code, "redirect refused", headers, fp)


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
      deadline_s: seconds after which no further attempt is begun.
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
    if urlsplit(url).scheme not in ("http", "https"):
        raise CallbackUndelivered(ErrorCode.INVALID_PARAMS, "the callback URL must begin with http:// or https://")
    body, opener, end = message.body(), _opener(), clock() + deadline_s
    attempt, wait = 0, FIRST_WAIT_S
    while True:
        attempt += 1
        timeout_s = max(0.1, min(ATTEMPT_TIMEOUT_S, end - clock()))
        reason = await asyncio.to_thread(_post, opener, url, body, token, timeout_s)
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


def _opener() -> OpenerDirector:
    """Opens exactly the URL it is given: no redirects, no proxy, verified TLS."""
    return build_opener(_NoRedirects(), ProxyHandler({}), HTTPSHandler(context=ssl.create_default_context()))


def _post(opener: OpenerDirector, url: str, body: bytes, token: str, timeout_s: float) -> str:
    """One attempt. Empty when it was taken, else a short reason without the server's own words."""
    headers = {"Content-Type": "application/json", "User-Agent": "orcd-jax"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = Request(url, data=body, method="POST", headers=headers)  # noqa: S310 - the scheme was checked
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            status = int(answer.status)
        return "" if 200 <= status < 300 else f"HTTP {status}"
    except HTTPError as error:
        error.close()
        return f"HTTP {error.code}" + (", a redirect, which is refused" if 300 <= error.code < 400 else "")
    except URLError as error:
        reason = error.reason
        return reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "no connection"
    except TimeoutError:
        return f"no answer within {timeout_s:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def _encode(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
