"""What a worker tells a person: one natural sentence for each log event (WORKER-4820).

Pure functions from numbers and names to text. None of them is given a prompt, an answer or a secret.
"""

from __future__ import annotations

_UNITS = ("bytes", "KB", "MB", "GB", "TB")


def size(count: int) -> str:
    """Bytes as a person says them: ``538 MB``, ``16.1 GB`` (powers of ten)."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit >= 3 and value < 100 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Time as a person says it: ``40 ms``, ``3.2 s``, ``2 min 5 s``, ``5 h 10 min``, ``3 d 4 h``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def count(number: int, thing: str) -> str:
    """``1 token``, ``7 tokens``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def startup(*, version: str, platform: str, address: str) -> str:
    """The process is up and listening; nothing is loaded yet."""
    where = "on the CPU, for development only" if platform == "cpu" else "on a GPU"
    return f"orcd-jax {version} starts {where} and listens at {address}; no model is loaded yet."


def model_load_start(*, model_ref: str) -> str:
    """Loading begins."""
    return f"Loading {model_ref}."


def model_load_progress(*, stage: str, percent: int) -> str:
    """One stage of loading has come this far."""
    stages = {
        "verify_files": "Checking the files",
        "restore": "Restoring the weights onto the device",
        "verify_arrays": "Proving the weights on the device",
        "compile": "Compiling the programs",
    }
    return f"{stages.get(stage, 'Loading')}: {percent} %."


def model_load_complete(*, model_ref: str, weights_bytes: int, seconds: float) -> str:
    """The weights are on the device, proved, and the programs are compiled."""
    return f"{model_ref} is loaded: {size(weights_bytes)} of weights, verified, in {duration(seconds)}."


def plan(*, model_ref: str, feasible: bool, reasons: int) -> str:
    """Somebody asked whether a model would fit."""
    what = model_ref or "the model this worker was started with"
    if feasible:
        return f"Asked about {what}: it would load here."
    return f"Asked about {what}: it would not load here, for {count(reasons, 'reason')}."


def sealed(*, model_ref: str, pinned: bool, emulated: bool) -> str:
    """The weights are proved from the device, and the handle is sealed."""
    memory = "emulated device memory" if emulated else "VRAM"
    origin = "as it was asked for from outside" if pinned else "as its own manifest says; nobody vouched for that"
    return f"{model_ref} is sealed: every byte in {memory} was proved, {origin}."


def proof_overdue(*, age_s: float) -> str:
    """Tokens are held back until the weights are proved again."""
    return f"The last proof of the weights is {duration(age_s)} old: no token leaves before the next one."


def attested(*, seconds: float) -> str:
    """Somebody was given a signed proof."""
    return f"Proved every byte of the weights anew in {duration(seconds)}, and signed it for whoever asked."


def ready(*, model_ref: str, slots: int, emulated: bool) -> str:
    """The worker takes jobs."""
    memory = "emulated on the CPU" if emulated else "resident in VRAM"
    return f"Ready: {model_ref} is {memory} and takes up to {count(slots, 'job')} at once."


def execute_start(*, job_id: str, tokens_in: int, token_fingerprint: str = "") -> str:
    """A job begins."""
    by = f" for the holder of token {token_fingerprint}" if token_fingerprint else ""
    return f"Job {job_id} begins with {count(tokens_in, 'prompt token')}{by}."


def execute_end(*, job_id: str, tokens_out: int, seconds: float, finish_reason: str) -> str:
    """A job ended well."""
    why = {
        "eos": "the model was done",
        "stop": "a stop string was met",
        "length": "its limit was reached",
    }.get(finish_reason, finish_reason)
    return f"Job {job_id} made {count(tokens_out, 'token')} in {duration(seconds)}; {why}."


def job_failed(*, job_id: str, message: str) -> str:
    """A job ended otherwise."""
    return f"Job {job_id} ended early: {message}"


def callback_delivered(*, attempts: int) -> str:
    """The pool manager knows."""
    return f"The pool manager was told, at attempt {attempts}."


def callback_retry(*, attempt: int, reason: str, wait_s: float) -> str:
    """The pool manager does not know yet."""
    return f"Attempt {attempt} to tell the pool manager failed ({reason}); the next one is in {duration(wait_s)}."


def drain(*, jobs: int, timeout_s: float) -> str:
    """New jobs are refused, running ones may finish."""
    if jobs == 0:
        return "Draining: no job is running, new ones are refused."
    return f"Draining: {count(jobs, 'job')} may finish within {duration(timeout_s)}, new ones are refused."


def shutdown(*, exit_code: int) -> str:
    """The last line."""
    return "Stopped cleanly." if exit_code == 0 else f"Stopped with exit code {exit_code}."
