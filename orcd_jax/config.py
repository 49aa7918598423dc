"""The worker's configuration: every flag, its rule and its default in one frozen model, validated whole at the edge.

Nothing reads a flag or the environment later. ``main`` makes its flags from the fields of :class:`WorkerConfig`, so a
flag's name, help, rule and default exist once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from orcd_jax.errors import ErrorCode, OrcdError

# Tokens in a prefill block: the grid on which prompts are computed and prefixes shared.
BLOCK_TOKENS = 128
# Rows of the decode program. On a CPU idle rows cost as much as busy ones, and 4 several times as much as 1:
# few rows keep a development run alive. A GPU step is bound by reading the weights: rows are almost free up to 64.
DEFAULT_SLOTS = {"cpu": 4, "cuda": 64}
# A GPU needs about 1 024 tokens a call to keep its matrix units busy; a CPU gains nothing from larger calls.
DEFAULT_PREFILL_TOKENS = {"cpu": 128, "cuda": 1024}

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,256}")


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field appears on the command line.

    Attributes:
      group: heading in ``--help``.
      rule: what a value must be, completing "must be …".
      shown: whether a refused value may be repeated; an address may hold a password.
    """

    group: str
    rule: str
    shown: bool = True


class ConfigError(OrcdError):
    """The configuration is not valid.

    Attributes:
      problems: one line for each problem, all of them.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(ErrorCode.INVALID_PARAMS, "; ".join(problems))
        self.problems = tuple(problems)


_IDENTITY, _MODEL, _NETWORK = "Identity", "Model and device", "Network"
_CAPACITY, _LIMITS, _OPERATION = "Capacity", "Limits", "Operation"


class WorkerConfig(BaseModel):
    """One worker's configuration. Fields are in an order in which each may depend on those before it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    worker_id: Annotated[str, Flag(_IDENTITY, "1 to 256 of A-Z a-z 0-9 _ -")] = Field(
        description="Name of this worker, chosen by the pool manager. Required."
    )
    pool_id: Annotated[str, Flag(_IDENTITY, "1 to 256 of A-Z a-z 0-9 _ -")] = Field(
        description="Name of the pool this worker belongs to. Required."
    )

    model_path: Annotated[Path, Flag(_MODEL, "the directory that a convert tool wrote")] = Field(
        description="Checkpoint directory, made by tools/convert_gguf.py or tools/convert_hf.py. Required."
    )
    platform: Annotated[Literal["cuda", "cpu"], Flag(_MODEL, "cuda or cpu")] = Field(
        default="cuda",
        description="Where to run. cpu is for development and tests: residency is emulated. There is no fallback.",
    )
    gpu_device: Annotated[int, Field(ge=0, le=1023), Flag(_MODEL, "an integer from 0 to 1023")] = Field(
        default=0,
        description="Index of the GPU this worker owns, among those CUDA_VISIBLE_DEVICES shows when it is set.",
    )

    rpc_port: Annotated[int, Field(ge=1024, le=65535), Flag(_NETWORK, "an integer from 1024 to 65535")] = Field(
        description="Port of the gRPC server. Required."
    )
    allow_insecure_bind: Annotated[bool, Flag(_NETWORK, "true or false")] = Field(
        default=False, description="Listen on an address that other hosts reach, although traffic is not encrypted."
    )
    bind_address: Annotated[str, Flag(_NETWORK, "an IP address")] = Field(
        default="127.0.0.1", description="Address of the gRPC server. Other than loopback needs --allow_insecure_bind."
    )
    api_token_file: Annotated[Path, Flag(_NETWORK, "a file that only its owner can read")] = Field(
        description="File with the bearer token (32 characters or more) that clients must send. Mode 0600. Required."
    )
    standalone: Annotated[bool, Flag(_NETWORK, "true or false")] = Field(
        default=False, description="Run without a pool manager: nobody is told when the worker is ready."
    )
    readiness_callback_url: Annotated[
        str, Flag(_NETWORK, "an http:// or https:// URL without a password in it", shown=False)
    ] = Field(default="", description="URL the worker POSTs its readiness or failure to. Required unless --standalone.")
    callback_token_file: Annotated[Path | None, Flag(_NETWORK, "a file that only its owner can read")] = Field(
        default=None, description="File with the bearer token that the callback sends, if the pool manager wants one."
    )
    callback_deadline: Annotated[
        float, Field(ge=1, le=3600, allow_inf_nan=False), Flag(_NETWORK, "a number of seconds from 1 to 3600")
    ] = Field(default=60.0, description="Seconds to keep trying the callback; then the worker drains and exits with 8.")

    slots_total: Annotated[int, Field(ge=0, le=1024), Flag(_CAPACITY, "an integer from 0 to 1024")] = Field(
        default=0, description="Jobs that run together. 0: 64 on cuda, 4 on cpu."
    )
    max_context: Annotated[int, Field(ge=0, le=16_777_216), Flag(_CAPACITY, "an integer from 0 to 16777216")] = Field(
        default=4096,
        description="Most tokens of one job, prompt and answer together, up to the model's own. 0: the model's own.",
    )
    prefill_tokens: Annotated[
        int,
        Field(ge=0, le=65_536, multiple_of=BLOCK_TOKENS),
        Flag(_CAPACITY, f"a multiple of {BLOCK_TOKENS} from 0 to 65536"),
    ] = Field(default=0, description="Prompt tokens computed in one call. 0: 1024 on cuda, 128 on cpu.")

    max_tokens: Annotated[int, Field(ge=1, le=1_048_576), Flag(_LIMITS, "an integer from 1 to 1048576")] = Field(
        default=4096, description="Most tokens one job may ask for."
    )
    max_prompt_chars: Annotated[int, Field(ge=1, le=10_000_000), Flag(_LIMITS, "an integer from 1 to 10000000")] = (
        Field(default=100_000, description="Longest prompt, in characters.")
    )
    execution_timeout_ms: Annotated[int, Field(ge=1, le=86_400_000), Flag(_LIMITS, "an integer from 1 to 86400000")] = (
        Field(default=300_000, description="Milliseconds a job may take when it names no deadline, and at most.")
    )
    drain_timeout_ms: Annotated[int, Field(ge=0, le=3_600_000), Flag(_LIMITS, "an integer from 0 to 3600000")] = Field(
        default=30_000, description="Milliseconds running jobs get to finish after the first SIGTERM."
    )

    compile_cache_dir: Annotated[Path | None, Flag(_OPERATION, "a directory that only its owner can use")] = Field(
        default=None,
        description="Directory that keeps compiled programs, so that a restart runs the same code without compiling. "
        "It holds code that is run: made with mode 0700, and refused when others can use it.",
    )
    allow_root: Annotated[bool, Flag(_OPERATION, "true or false")] = Field(
        default=False, description="Run as root, which is refused otherwise."
    )
    log_format: Annotated[Literal["json", "console"], Flag(_OPERATION, "json or console")] = Field(
        default="json", description="Log lines on stderr: one JSON object each, or plain text."
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Flag(_OPERATION, "debug, info, warning or error")
    ] = Field(default="info", description="Least level that is logged.")

    @property
    def address(self) -> str:
        """Where the gRPC server listens, as ``host:port`` (``[host]:port`` for IPv6)."""
        return (
            f"[{self.bind_address}]:{self.rpc_port}"
            if ":" in self.bind_address
            else f"{self.bind_address}:{self.rpc_port}"
        )

    @classmethod
    def from_flags(cls, values: Mapping[str, str | bool]) -> Self:
        """Validates what was given; a flag that is absent takes its default.

        Args:
          values: flag name to its text as given, or to a boolean.

        Raises:
          ConfigError: listing every problem, each as ``--flag: value, rule``.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError([_problem(cls, cast("dict[str, object]", e)) for e in error.errors()]) from None

    @field_validator("worker_id", "pool_id")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not _IDENTIFIER.fullmatch(value):
            raise ValueError
        return value

    @field_validator("model_path", "api_token_file", "callback_token_file", "compile_cache_dir")
    @classmethod
    def _path(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        text = str(value)
        if text == "." or "\0" in text or len(text) > 4096:
            raise ValueError
        return value.expanduser()

    @field_validator("bind_address")
    @classmethod
    def _bind_address(cls, value: str, info: ValidationInfo) -> str:
        address = ipaddress.ip_address("127.0.0.1" if value == "localhost" else value)
        if not address.is_loopback and not info.data.get("allow_insecure_bind", True):
            raise ValueError(
                "other hosts could reach it and traffic is not encrypted: use 127.0.0.1, or add --allow_insecure_bind "
                "on a trusted network"
            )
        return str(address)

    @field_validator("readiness_callback_url")
    @classmethod
    def _callback_url(cls, value: str, info: ValidationInfo) -> str:
        standalone = info.data.get("standalone")
        if not value:
            if standalone is False:
                raise ValueError("give the pool manager's URL, or --standalone to run without one")
            return value
        if standalone:
            raise ValueError("a standalone worker tells nobody: give either this or --standalone")
        url = urlsplit(value)
        url.port  # noqa: B018 - raises ValueError when it is not a number in range
        hostile = any(c.isspace() or not c.isprintable() for c in value)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.fragment or hostile:
            raise ValueError
        return value

    @field_validator("slots_total")
    @classmethod
    def _slots_of_platform(cls, value: int, info: ValidationInfo) -> int:
        return value or DEFAULT_SLOTS[info.data.get("platform", "cuda")]

    @field_validator("prefill_tokens")
    @classmethod
    def _prefill_tokens_of_platform(cls, value: int, info: ValidationInfo) -> int:
        return value or DEFAULT_PREFILL_TOKENS[info.data.get("platform", "cuda")]


def flag_of(name: str) -> Flag:
    """The command-line side of a field of :class:`WorkerConfig`."""
    return next(item for item in WorkerConfig.model_fields[name].metadata if isinstance(item, Flag))


def _problem(config: type[WorkerConfig], error: dict[str, object]) -> str:
    """One line about one problem that pydantic found."""
    location = cast("tuple[str, ...]", error["loc"])
    name = str(location[0])
    if name not in config.model_fields:
        return f"--{name:.40}: there is no such flag; see --help"
    flag = flag_of(name)
    rule = flag.rule
    if error["type"] == "missing":
        return f"--{name}: missing; it must be {rule}"
    context = error.get("ctx")
    reason = str(context.get("error", "")) if isinstance(context, dict) and error["type"] == "value_error" else ""
    shown = ascii(error["input"])[:40] if flag.shown else "what was given"
    # A validator of ours that has more to say than the rule says it; a library's text is not passed on.
    if reason and ("--" in reason):
        return f"--{name}: {shown} is not allowed: {reason}"
    return f"--{name}: {shown} is not allowed; it must be {rule}"
