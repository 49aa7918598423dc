"""The worker's configuration: every flag, its rule and its default in one frozen model, validated whole at the edge.

Nothing reads a flag or the environment later. ``main`` makes its flags from the fields of :class:`WorkerConfig`, so a
flag's name, help, rule and default exist once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from orcd_jax import config_rules as rules
from orcd_jax.errors import ErrorCode, OrcdError

# Tokens in a prefill block: the grid on which prompts are computed and prefixes shared.
BLOCK_TOKENS = 128
# Rows of the decode program. On a CPU idle rows cost as much as busy ones, and 4 several times as much as 1:
# few rows keep a development run alive. A GPU step is bound by reading the weights: rows are almost free up to 64.
DEFAULT_SLOTS = {"cpu": 4, "cuda": 64}
# A GPU needs about 1 024 tokens a call to keep its matrix units busy; a CPU gains nothing from larger calls.
DEFAULT_PREFILL_TOKENS = {"cpu": 128, "cuda": 1024}

Given = str | bool | int | float
"""A value as a source gives it: flags and the environment give text, a file may give numbers."""


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


_Identifier = Annotated[str, AfterValidator(rules.identifier)]
_Size = Annotated[int, BeforeValidator(rules.size)]
_Digest = Annotated[str, AfterValidator(rules.sha256)]
_Url = Annotated[str, AfterValidator(rules.http_url)]
_Path = Annotated[Path, AfterValidator(rules.path)]
_OptionalPath = Annotated[Path | None, AfterValidator(rules.path)]

_IDENTITY, _MODEL, _NETWORK, _TRUST = "Identity", "Model and device", "Network", "Seals and trust"
_CAPACITY, _LIMITS, _OPERATION = "Capacity", "Limits", "Operation"


class WorkerConfig(BaseModel):
    """One worker's configuration. Fields are in an order in which each may depend on those before it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    worker_id: Annotated[_Identifier, Flag(_IDENTITY, "1 to 256 of A-Z a-z 0-9 _ -")] = Field(
        description="Name of this worker, chosen by the pool manager. Required."
    )
    pool_id: Annotated[_Identifier, Flag(_IDENTITY, "1 to 256 of A-Z a-z 0-9 _ -")] = Field(
        description="Name of the pool this worker belongs to. Required."
    )

    model_path: Annotated[_Path, Flag(_MODEL, "the directory that a convert tool wrote")] = Field(
        description="Checkpoint directory, made by tools/convert_gguf.py or tools/convert_hf.py. Required."
    )
    model_root: Annotated[_OptionalPath, Flag(_MODEL, "a directory")] = Field(
        default=None,
        description="Directory below which Plan and Commit may name other models. Without it only --model_path.",
    )
    await_commit: Annotated[bool, Flag(_MODEL, "true or false")] = Field(
        default=False, description="Load nothing at start: listen, and load what the first Commit names."
    )
    max_model_bytes: Annotated[
        _Size, Field(ge=1, le=2**50), Flag(_MODEL, "a size up to 2^50 bytes, such as 80GB or 24GiB")
    ] = Field(default=100_000_000_000, description="Largest model that is loaded, in bytes of its weights.")
    max_staging_bytes: Annotated[
        _Size, Field(ge=2**20, le=2**50), Flag(_MODEL, "a size from 2^20 to 2^50 bytes, such as 8GiB")
    ] = Field(default=8 * 2**30, description="Host memory that restoring the weights may use at once, in bytes.")
    platform: Annotated[Literal["cuda", "cpu"], Flag(_MODEL, "cuda or cpu")] = Field(
        default="cuda",
        description="Where to run. cpu is for development and tests: residency is emulated. There is no fallback.",
    )
    gpu_device: Annotated[int, Field(ge=0, le=1023), Flag(_MODEL, "an integer from 0 to 1023")] = Field(
        default=0,
        description="Index of the GPU this worker owns, among those CUDA_VISIBLE_DEVICES shows when it is set.",
    )
    allow_shared_gpu: Annotated[bool, Flag(_MODEL, "true or false")] = Field(
        default=False,
        description="Load although other processes hold memory of the GPU, or the driver does not tell. No plan is "
        "certain then.",
    )
    emulated_memory: Annotated[_Size, Field(ge=0, le=2**50), Flag(_MODEL, "a size up to 2^50 bytes, such as 24GiB")] = (
        Field(
            default=0,
            description="With --platform=cpu: device memory to plan for, as if there were a device. 0: no limit.",
        )
    )

    rpc_port: Annotated[int, Field(ge=1024, le=65535), Flag(_NETWORK, "an integer from 1024 to 65535")] = Field(
        description="Port of the gRPC server. Required."
    )
    tls_cert_file: Annotated[_OptionalPath, Flag(_NETWORK, "a PEM file")] = Field(
        default=None, description="Certificate chain of the gRPC server; with --tls_key_file. Without: no TLS."
    )
    tls_key_file: Annotated[_OptionalPath, Flag(_NETWORK, "a PEM file that only its owner can read")] = Field(
        default=None, description="Private key of the certificate. Mode 0600."
    )
    tls_client_ca_file: Annotated[_OptionalPath, Flag(_NETWORK, "a PEM file")] = Field(
        default=None, description="Authorities whose client certificates are let in, and no one else (mutual TLS)."
    )
    allow_insecure_bind: Annotated[bool, Flag(_NETWORK, "true or false")] = Field(
        default=False, description="Listen on an address that other hosts reach, although traffic is not encrypted."
    )
    bind_address: Annotated[str, Flag(_NETWORK, "an IP address")] = Field(
        default="127.0.0.1",
        description="Address of the gRPC server. Other than loopback needs TLS or --allow_insecure_bind.",
    )
    api_token_file: Annotated[_Path, Flag(_NETWORK, "a file that only its owner can read")] = Field(
        description="File with the bearer token (32 characters or more) that clients must send. Mode 0600. Required."
    )
    control_token_file: Annotated[_OptionalPath, Flag(_NETWORK, "a file that only its owner can read")] = Field(
        default=None,
        description="File with the bearer token for Plan, Commit, Attest, GetStatus, Drain and Shutdown. Mode 0600. "
        "Without it nobody can call these.",
    )
    connections_per_peer: Annotated[int, Field(ge=1, le=128), Flag(_NETWORK, "an integer from 1 to 128")] = Field(
        default=32,
        description="Connections that one address may have open, of the 128 there may be. All that comes through a "
        "proxy, or from this host, has one address.",
    )
    open_ready: Annotated[bool, Flag(_NETWORK, "true or false")] = Field(
        default=False, description="Answer Ready without a token."
    )
    metrics_port: Annotated[int, Field(ge=-1, le=65535), Flag(_NETWORK, "-1, 0, or a port from 1024 to 65535")] = Field(
        default=0, description="Loopback port of /metrics and health over HTTP. 0: a free one, logged. -1: none."
    )
    standalone: Annotated[bool, Flag(_NETWORK, "true or false")] = Field(
        default=False, description="Run without a pool manager: nobody is told when the worker is ready."
    )
    readiness_callback_url: Annotated[
        _Url, Flag(_NETWORK, "an http:// or https:// URL without a password in it", shown=False)
    ] = Field(default="", description="URL the worker POSTs its readiness or failure to. Required unless --standalone.")
    callback_token_file: Annotated[_OptionalPath, Flag(_NETWORK, "a file that only its owner can read")] = Field(
        default=None, description="File with the bearer token that the callback sends, if the pool manager wants one."
    )
    callback_deadline: Annotated[
        float, Field(ge=1, le=3600, allow_inf_nan=False), Flag(_NETWORK, "a number of seconds from 1 to 3600")
    ] = Field(default=60.0, description="Seconds to keep trying the callback; then the worker drains and exits with 8.")

    expected_digest: Annotated[_Digest, Flag(_TRUST, "64 hex digits")] = Field(
        default="", description="Model digest the weights must have. With it, or a trusted signature, they are pinned."
    )
    signature_file: Annotated[_OptionalPath, Flag(_TRUST, "a file that `orcd sign` or model-signing wrote")] = Field(
        default=None, description="Signature over the model; needs --trusted_keys_file."
    )
    trusted_keys_file: Annotated[_OptionalPath, Flag(_TRUST, "a PEM file of public keys")] = Field(
        default=None, description="Public keys whose signatures over a model are trusted."
    )
    require_pinned: Annotated[bool, Flag(_TRUST, "true or false")] = Field(
        default=False, description="Refuse a model without an expected digest or a trusted signature."
    )
    seal_max_age: Annotated[
        float, Field(ge=0, le=5, allow_inf_nan=False), Flag(_TRUST, "a number of seconds from 0 to 5")
    ] = Field(
        default=5.0,
        description="Seconds for which a proof of the weights on the device holds. No token leaves later than this "
        "after the last proof of any byte. 0: a whole proof before each job, and every 5 s meanwhile.",
    )
    seal_key_file: Annotated[_OptionalPath, Flag(_TRUST, "a file that only its owner can read")] = Field(
        default=None, description="Key of the seal, 64 hex digits. Without it: a random one for each process."
    )
    identity_key_file: Annotated[_OptionalPath, Flag(_TRUST, "a file that only its owner can read")] = Field(
        default=None,
        description="Ed25519 key (PEM) that signs attestations; made at the first start. Default: identity.pem in "
        "--state_dir.",
    )

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

    watchdog_timeout: Annotated[
        float, Field(ge=5, le=3600, allow_inf_nan=False), Flag(_LIMITS, "a number of seconds from 5 to 3600")
    ] = Field(default=30.0, description="Seconds without progress of the device, or of the process, until it is ended.")
    max_restarts: Annotated[int, Field(ge=0, le=1000), Flag(_LIMITS, "an integer from 0 to 1000")] = Field(
        default=5, description="Abnormal ends within five minutes after which the worker does not start. 0: no limit."
    )

    state_dir: Annotated[_OptionalPath, Flag(_OPERATION, "a directory that only its owner can use")] = Field(
        default=None,
        description="Where the worker keeps its identity key, its restarts, its recorded plans and the audit log. "
        "Default: $STATE_DIRECTORY, else ~/.local/state/orcd-jax; in it a folder for each worker_id.",
    )
    audit_fsync: Annotated[Literal["always", "critical", "never"], Flag(_OPERATION, "always, critical or never")] = (
        Field(default="critical", description="Which audit records are forced onto the disk at once.")
    )
    audit_on_failure: Annotated[Literal["continue", "stop"], Flag(_OPERATION, "continue or stop")] = Field(
        default="continue",
        description="When the audit log cannot be written: count what is lost and go on, or drain and exit with 12.",
    )
    otlp_endpoint: Annotated[
        _Url, Flag(_OPERATION, "an http:// or https:// URL without a password in it", shown=False)
    ] = Field(default="", description="Where OpenTelemetry traces are sent (OTLP over HTTP). Empty: nowhere.")
    compile_cache_dir: Annotated[_OptionalPath, Flag(_OPERATION, "a directory that only its owner can use")] = Field(
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
    def from_flags(cls, values: Mapping[str, Given], sources: Mapping[str, str] | None = None) -> Self:
        """Validates what was given; a field that is absent takes its default.

        Args:
          values: field name to what was given.
          sources: field name to where its value was found, for those not given as a flag.

        Raises:
          ConfigError: listing every problem, each as ``--flag: value, rule``.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = (_problem(cast("dict[str, object]", e), values, sources or {}) for e in error.errors())
            raise ConfigError(list(problems)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_truth(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError
        return value

    @field_validator("bind_address")
    @classmethod
    def _bind_address(cls, value: str, info: ValidationInfo) -> str:
        encrypted = info.data.get("tls_cert_file", value) is not None
        return rules.bind_address(value, exposed_ok=encrypted or info.data.get("allow_insecure_bind", True))

    @field_validator(*rules.FITS)
    @classmethod
    def _fits(cls, value: object, info: ValidationInfo) -> object:
        rules.FITS[info.field_name or ""](value, info.data)
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


def _problem(error: dict[str, object], values: Mapping[str, Given], sources: Mapping[str, str]) -> str:
    """One line about one problem that pydantic found."""
    location = cast("tuple[str, ...]", error["loc"])
    name = str(location[0])
    if name not in WorkerConfig.model_fields:
        return f"--{name:.40}: there is no such flag; see --help"
    flag = flag_of(name)
    reason = cast("dict[str, object]", error.get("ctx", {})).get("error")
    # What a rule of ours says is passed on; a library's text, which may repeat the value at any length, is not.
    rule = f": {reason}" if isinstance(reason, rules.Unfit) else f"; it must be {flag.rule}"
    if name not in values:
        return f"--{name}: missing{rule}"
    shown = ascii(error["input"])[:40] if flag.shown else "what was given"
    source = f" from {sources[name]}" if name in sources else ""
    return f"--{name}: {shown}{source} is not allowed{rule}"
