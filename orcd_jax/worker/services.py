"""What a worker is given besides its configuration: keys, the audit, the metrics, what the driver says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orcd_jax.checkpoint.signature import PublicKey
from orcd_jax.device.gpu_health import GpuHealth
from orcd_jax.residency.keys import IdentityKey, SealKey
from orcd_jax.telemetry.audit import AuditLog, NoAudit
from orcd_jax.telemetry.metrics import WorkerMetrics
from orcd_jax.telemetry.trace import Tracing


def _fresh_identity() -> IdentityKey:
    return IdentityKey(Ed25519PrivateKey.generate())


@dataclass(slots=True, kw_only=True)
class Services:
    """Each is made and closed by ``main``; the defaults keep nothing and last as long as the process.

    Attributes:
      identity: signs what leaves the worker.
      seal_key: seals what stays in it.
      trusted_keys: whose signatures over a model count.
      signature: over the model of ``--model_path``; empty: none.
      plans_directory: where the analyses of compiled programs are kept.
      gpu_health: the driver's last word, from a cache.
      tracing: makes a span of each job, where an exporter is configured.
      metrics_port: where the metrics are; 0: nowhere.
      audit_failed: whether the audit could not be written and the worker is to stop for it.
    """

    audit: AuditLog | NoAudit = field(default_factory=NoAudit)
    metrics: WorkerMetrics = field(default_factory=lambda: WorkerMetrics("cpu"))
    identity: IdentityKey = field(default_factory=_fresh_identity)
    seal_key: SealKey = field(default_factory=SealKey)
    trusted_keys: tuple[PublicKey, ...] = ()
    signature: bytes = b""
    plans_directory: Path | None = None
    gpu_health: Callable[[], GpuHealth] = GpuHealth
    tracing: Tracing = field(default_factory=Tracing)
    metrics_port: int = 0
    audit_failed: bool = False
