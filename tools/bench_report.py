"""What a bench says: progress on stderr as it works, and a JSON file that holds every figure from when it was made."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax

from orcd_jax import __version__
from orcd_jax.device.gpu_health import GpuProbe
from orcd_jax.errors import ExitCode, OrcdError

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")


class BenchError(Exception):
    """A section of a bench cannot give its figure; the message says why."""


class Report:
    """Owns the figures and the errors of one run of a tool. The file is written anew at every change."""

    def __init__(
        self, tool: str, device: jax.Device, path: Path | None, arguments: Sequence[str] | None, **facts: object
    ) -> None:
        """Writes the file for the first time.

        Args:
          tool: its name.
          device: what it measures.
          path: of the JSON file, or None.
          arguments: of its command line; None: those of the process.
          facts: what the figures are compared with.

        Raises:
          OSError: the file cannot be written.
        """
        self._device, self._path, self._began_s = device, path, time.monotonic()
        self._figures: dict[str, Mapping[str, object]] = {}
        self._errors: list[dict[str, str]] = []
        self._head: dict[str, object] = {
            "tool": tool,
            "arguments": list(sys.argv[1:] if arguments is None else arguments),
            "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.device_kind,
            "platform": device.platform,
            "jax": jax.__version__,
            "versions": _versions(device),
            **facts,
        }
        self._write(complete=False)

    @property
    def failed(self) -> bool:
        """Whether a section ended in an error."""
        return bool(self._errors)

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the beginning."""
        print(f"[{time.monotonic() - self._began_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    def put(self, name: str, figure: Mapping[str, object]) -> None:
        """Keeps a figure; one of the same name is replaced."""
        self._figures[name] = figure
        self._write(complete=False)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What fails inside is said, kept, and passed over: the other sections still give their figures."""
        try:
            yield
        except (BenchError, OrcdError) as error:
            self._fail(name, str(error))
        except Exception as error:
            traceback.print_exc()
            self._fail(name, f"{type(error).__name__}: {str(error)[:2000]}")

    def finish(self, **facts: object) -> None:
        """Everything was tried: says so in the file, with what came of it."""
        self._head |= facts
        self._write(complete=True)

    def _fail(self, name: str, message: str) -> None:
        self._errors.append({"section": name, "error": message})
        self.say(f"error: {name}: {message}")
        self._write(complete=False)

    def _write(self, *, complete: bool) -> None:
        if self._path is None:
            return
        stats = self._device.memory_stats() or {}
        content = {
            **self._head,
            "complete": complete,
            "seconds": round(time.monotonic() - self._began_s, 1),
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "errors": self._errors,
            "figures": list(self._figures.values()),
        }
        beside = self._path.with_name(f".{self._path.name}.part")  # who is killed while writing leaves the last one
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(self._path)


def first_device() -> jax.Device:
    """What a bench measures: the first device of the platform that JAX may use. Ends the process when there is none."""
    try:
        return jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # the second when JAX has no plugin for the one it may use
        print(f"error: JAX finds no device: check nvidia-smi, JAX_PLATFORMS and its plugin ({error})", file=sys.stderr)
        sys.exit(ExitCode.NO_DEVICE)


def json_file(text: str) -> Path:
    """A path in a folder that can be written: known before anything is measured."""
    path = Path(text)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} cannot be written: choose a file in a folder that is there")
    return path


def is_gpu(device: jax.Device) -> bool:
    """Whether figures of this device are claims; those of a CPU are not."""
    return bool(device.platform == "gpu")


def integers(text: str) -> list[int]:
    """Comma-separated positive integers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def _versions(device: jax.Device) -> dict[str, str]:
    found = {"python": platform.python_version(), "orcd-jax": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["platform"] = device.client.platform_version
    if is_gpu(device):
        probe = GpuProbe(os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
        health = probe.read()
        probe.close()
        known = {"driver": health.driver_version, "cuda": health.cuda_version}
        found |= {name: version for name, version in known.items() if version is not None}
    return found
