"""The executable fingerprint: what was compiled, and by what, in one SHA-256 (part of the seal, WORKER-4120)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from importlib import metadata

import jax

from orcd_jax import __version__

# Where an operation came from in the source: it changes from run to run and says nothing about what is computed.
_METADATA = re.compile(r', metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:\d.*\n)*", re.MULTILINE)
_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cublas-cu12", "nvidia-cublas")


def executable_fingerprint(programs: Mapping[str, jax.stages.Compiled], device: jax.Device) -> str:
    """64 hex digits over each program's optimised HLO (kernels and their tuning included) and over what runs it.

    Equal for two compilations of the same code for the same kind of device by the same versions, and only then.
    """
    outer = hashlib.sha256(b"orcd-executable-v1\0")
    for part in (*_surroundings(device), *(f"{name}\n{canonical_hlo(programs[name])}" for name in sorted(programs))):
        outer.update(hashlib.sha256(part.encode()).digest())
    return outer.hexdigest()


def canonical_hlo(program: jax.stages.Compiled) -> str:
    """The program as text, without where its operations came from."""
    return _METADATA.sub("", _TABLES.sub("", program.as_text() or ""))


def _surroundings(device: jax.Device) -> tuple[str, ...]:
    versions = (f"{name} {_version(name)}" for name in _PACKAGES)
    return (
        f"orcd-jax {__version__}",
        *versions,
        f"device {device.device_kind}",
        f"platform {device.client.platform_version}",
        f"flags {os.environ.get('XLA_FLAGS', '')}",
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
