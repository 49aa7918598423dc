"""``orcd execute``: one job, shown while it runs."""

from __future__ import annotations

import secrets
import sys
from contextlib import aclosing

from orcd_jax.api.orcd.worker import v1
from orcd_jax.cli.connection import CallFailed, Connection, failed
from orcd_jax.cli.job import Job
from orcd_jax.cli.show import word
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ErrorCode, ExitCode
from orcd_jax.telemetry import narration


async def execute(worker: Connection, job: Job, output: Output, *, as_json: bool) -> ExitCode:
    """Runs ``job`` and writes its answer, or its events as JSON, as they come.

    Raises:
      CallFailed: it was refused, or failed.
      ReaderGone: nobody reads any more; the job is cancelled.
    """
    end: v1.JobEnd | None = None
    try:
        async with aclosing(worker.execute(request(job), job.timeout_s)) as events:
            async for event in events:
                if event.error is not None:
                    raise failed(event.error)
                if as_json:
                    output.json(fields(event))
                elif event.token is not None:
                    output.text(event.token.text)
                end = event.end or end
    finally:
        output.end_line()
    if end is None:
        raise CallFailed(ErrorCode.INTERNAL.value, "the worker ended the call without an end of the job")
    if not as_json:
        _summarise(summary(end, sampled=bool(job.temperature)))
    return ExitCode.OK


def request(job: Job) -> v1.ExecuteRequest:
    """The job as the worker is asked for it."""
    asked = v1.ExecuteRequest(
        job_id=f"cli-{secrets.token_hex(8)}" if job.job_id is None else job.job_id,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        top_k=job.top_k,
        min_p=job.min_p,
        seed=job.seed,
        stop=list(job.stop),
        ignore_eos=job.ignore_eos,
    )
    if job.chat:
        turns = [] if job.system is None else [v1.ChatMessage(role="system", content=job.system)]
        asked.chat = v1.Chat(messages=[*turns, v1.ChatMessage(role="user", content=job.prompt)])
    else:
        asked.prompt_text = job.prompt
    return asked


def fields(event: v1.ExecuteEvent) -> dict[str, object]:
    """An event as JSON shows it; errors are shown elsewhere, in one place with those that are no events."""
    if (started := event.started) is not None:
        return {
            "event": "started",
            "job_id": started.job_id,
            "model": started.model,
            "started_at_ms": started.started_at_ms,
            "seed": started.seed,
        }
    if (token := event.token) is not None:
        return {"event": "token", "t": token.text, "i": token.index, "ids": list(token.token_ids)}
    if (metrics := event.metrics) is not None:
        return {
            "event": "metrics",
            "tokens_out": metrics.tokens_out,
            "decode_time_ms": metrics.decode_time_ms,
            "vram_bytes": metrics.vram_bytes,
        }
    if (end := event.end) is not None:
        return {
            "event": "end",
            "finish_reason": word(end.finish_reason),
            "tokens_in": end.tokens_in,
            "tokens_out": end.tokens_out,
            "decode_time_ms": end.decode_time_ms,
            "time_to_first_token_ms": end.time_to_first_token_ms,
            "cached_prompt_tokens": end.cached_prompt_tokens,
            "seed": end.seed,
        }
    return {"event": "unknown"}  # of a newer worker


def summary(end: v1.JobEnd, *, sampled: bool) -> str:
    """How a job went, in one line."""
    said = [
        f"{narration.count(end.tokens_in, 'token')} in, {end.tokens_out} out",
        f"first after {narration.duration(end.time_to_first_token_ms / 1e3)}",
    ]
    if end.tokens_out > 1 and end.decode_time_ms > 0:  # the first token is of the prompt's time
        said.append(f"{(end.tokens_out - 1) / (end.decode_time_ms / 1e3):.1f} tokens/s")
    said.append(f"finish: {word(end.finish_reason)}")
    if sampled:
        said.append(f"seed {end.seed}")
    return " · ".join(said)


def _summarise(line: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(Text(line, style="dim"))
