"""The pool manager, as far as a worker knows it: whom to tell that it is ready, or why it ends (WORKER-4023, 4961)."""

from __future__ import annotations

import asyncio
from typing import Any

from orcd_jax.config import WorkerConfig
from orcd_jax.config_files import read_private
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry import log, narration
from orcd_jax.worker.callback import Failure, Readiness, deliver

LAST_WORD_S = 10.0
"""For telling why the worker ends: long enough for a pool manager that is slow, and no reason to hold a device for one
that is down. Its supervisor has the exit code."""

URGENT_S = 5.0
"""The same, when the worker was asked to end meanwhile, or ends after everything else has."""

_TOKEN_BYTES = 4096


class PoolManager:
    """Whom the worker tells; nobody with ``--standalone``. Imports no JAX: it is told of failures before that, too."""

    def __init__(self, config: WorkerConfig) -> None:
        """Reads nothing and tells nothing yet."""
        self._config = config
        self._token = ""

    @property
    def there(self) -> bool:
        """Whether there is one."""
        return bool(self._config.readiness_callback_url)

    def read_token(self) -> None:
        """Reads the token that it wants. Raises INVALID_PARAMS when the file is not as it must be."""
        if self._config.callback_token_file is not None:
            text = read_private(self._config.callback_token_file, "callback_token_file", _TOKEN_BYTES)
            self._token = text.strip()

    async def tell_ready(self, readiness: Readiness) -> None:
        """Tells it until ``--callback_deadline``. Raises CallbackUndelivered."""
        if self.there:
            await self._tell(readiness, self._config.callback_deadline)

    async def tell_failure(
        self,
        error: BaseException,
        code: ExitCode,
        *,
        deadline_s: float = LAST_WORD_S,
        stop: asyncio.Future[Any] | None = None,
    ) -> None:
        """Tells it why the worker ends. What cannot be told is logged, and nothing raised.

        Args:
          error: the reason; of one that is none of ours nothing is told but that it is a bug.
          code: by which the process will end.
          deadline_s: seconds to keep trying; ``--callback_deadline`` when that is less.
          stop: done when the worker is asked to end: from then on there are :data:`URGENT_S`.
        """
        if not self.there:
            return
        known = error if isinstance(error, OrcdError) else OrcdError(ErrorCode.INTERNAL, "an internal error")
        failure = Failure(
            worker_id=self._config.worker_id,
            pool_id=self._config.pool_id,
            code=known.code.value,
            message=known.message,
            retriable=known.spec.retriable,
            exit_code=int(code),
            retry_after_ms=known.retry_after_ms,
        )
        telling = asyncio.ensure_future(self._tell(failure, min(self._config.callback_deadline, deadline_s)))
        if stop is not None:
            await asyncio.wait((telling, stop), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((telling,), timeout=None if stop is None else URGENT_S)
        telling.cancel()
        await asyncio.wait((telling,))
        if telling.cancelled():
            self._say_untold("the worker was asked to end")
        elif (undelivered := telling.exception()) is not None:
            self._say_untold(undelivered.message if isinstance(undelivered, OrcdError) else log.where(undelivered))

    async def _tell(self, message: Readiness | Failure, deadline_s: float) -> None:
        """Tells it, and the log how that goes. The token is read anew: a worker may live for longer than one."""
        logger = log.get_logger()
        try:
            self.read_token()
        except OrcdError as error:
            human = f"The callback's token was not read again, the old one is used: {error.message}"
            logger.warning(log.EventCode.CALLBACK, human=human, field=error.field)

        def on_retry(attempt: int, reason: str, wait_s: float) -> None:
            said = narration.callback_retry(attempt=attempt, reason=reason, wait_s=wait_s)
            logger.warning(log.EventCode.CALLBACK, human=said, attempt=attempt)

        url = self._config.readiness_callback_url
        attempts = await deliver(url, message, deadline_s=deadline_s, token=self._token, on_retry=on_retry)
        logger.info(log.EventCode.CALLBACK, human=narration.callback_delivered(attempts=attempts), attempt=attempts)

    def _say_untold(self, why: str) -> None:
        human = f"The pool manager was not told why this worker ends ({why})."
        log.get_logger().warning(log.EventCode.CALLBACK, human=human)
