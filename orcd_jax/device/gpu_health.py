"""How the GPU is: temperature, power, memory errors, who else holds memory. Asked of NVML, never of JAX or CUDA.

    probe = GpuProbe(mask=os.environ["CUDA_VISIBLE_DEVICES"])
    sampler = GpuHealthSampler(probe.read)
    sampler.start()
    sampler.latest().temperature_c

Nothing here raises: what cannot be learnt is None. On a machine without an NVIDIA driver that is everything.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_char, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Protocol

INTERVAL_S = 5.0
STALE_S = 3 * INTERVAL_S  # NVML hangs with a GPU that fell off its bus: its last words are not news
FIRST_S = 5.0
"""Seconds to wait for the first reading, which takes milliseconds where NVML answers at all."""

DRIVER_BYTES = 128 * 2**20
"""In use at most of a GPU that nobody uses: the driver's own small change. A CUDA context takes several times that."""

_TEXT_BYTES = 96  # NVML's largest for a name, a version and a UUID
_MOST_PROCESSES = 1024
# Values of nvml.h.
_TEMPERATURE_GPU = 0
_UNCORRECTED, _VOLATILE = 1, 0
_NOT_AVAILABLE = 2**64 - 1
_PCI_BUS_ID = re.compile(r"([0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Another process that computes on the GPU.

    Attributes:
      memory_bytes: device memory it holds; None when the driver does not tell.
    """

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """One reading; None is what could not be learnt.

    Attributes:
      uuid: of the GPU, or of the MIG instance.
      cuda_version: the newest the driver can run, such as ``13.0``.
      power_w: of the whole board.
      ecc_uncorrected: memory errors that could not be corrected since the driver was loaded.
      memory_total_bytes: with what the driver keeps for itself.
      memory_used_bytes, memory_free_bytes: by and for all processes, without what the driver keeps for itself.
      own_memory_bytes: what this process holds; None too where the driver does not list it, because it has not opened
        the device, or is in a container.
      other_processes: all but this one that compute on the device. The driver does not show a container the processes
        of its host.
    """

    uuid: str | None = None
    name: str | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    ecc_uncorrected: int | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    own_memory_bytes: int | None = None
    other_processes: tuple[GpuProcess, ...] | None = None

    @property
    def usable_memory_bytes(self) -> int | None:
        """What all processes together can get of the device."""
        if self.memory_used_bytes is None or self.memory_free_bytes is None:
            return None
        return self.memory_used_bytes + self.memory_free_bytes


def foreign_bytes(before: GpuHealth, now: GpuHealth) -> int | None:
    """What other processes hold of the device; None when the driver does not tell.

    All that is in use, less what this process holds: so those count, too, that a container is not shown. Where the
    driver does not list this process, it is what was in use before this process held anything.

    Args:
      before: read before this process opened the device.
      now: the last reading.
    """
    used, own, others = now.memory_used_bytes, now.own_memory_bytes, now.other_processes
    beside = before.memory_used_bytes if own is None or used is None else used - own
    if used is None or others is None or beside is None:
        return None
    if not others and beside <= DRIVER_BYTES:
        return 0
    return max(beside, sum(process.memory_bytes or 0 for process in others))


class Library(Protocol):
    """libnvidia-ml as ctypes shows it: functions that return 0 when they succeed."""

    def __getattr__(self, name: str) -> Callable[..., int]: ...


class _Memory(ctypes.Structure):
    """nvmlMemory_v2_t."""

    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_v2_t."""

    _fields_ = (
        ("pid", c_uint),
        ("memory", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    )


class GpuProbe:
    """Owns a session with NVML and the handle of one device."""

    def __init__(self, mask: str, *, device_order: str = "PCI_BUS_ID", library: Library | None = None) -> None:
        """Opens NVML and finds the device.

        Args:
          mask: the process's CUDA_VISIBLE_DEVICES: an index, ``GPU-…`` (a beginning that is unique will do) or
            ``MIG-…``; or the PCI bus id of the device. Of several the first counts.
          device_order: the process's CUDA_DEVICE_ORDER. In another order than PCI_BUS_ID an index names a device only
            where there is one.
          library: stands in for libnvidia-ml.so.1.
        """
        self._library = library if library is not None else _load()
        self._open = self._call("nvmlInit_v2")
        self._device = self._find(mask.split(",")[0].strip(), device_order) if self._open else None
        self._board = self._device
        parent = c_void_p()
        if self._device is not None and self._call(
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", self._device, byref(parent)
        ):
            self._board = parent  # a slice of a GPU has no temperature of its own

    def read(self) -> GpuHealth:
        """Asks NVML, which blocks when the GPU is in trouble."""
        if self._device is None or self._board is None:
            return GpuHealth()
        total, used, free = self._memory(self._device)
        own, others = self._processes(self._device)
        power_mw = self._unsigned("nvmlDeviceGetPowerUsage", self._board)
        return GpuHealth(
            uuid=self._text("nvmlDeviceGetUUID", self._device),
            name=self._text("nvmlDeviceGetName", self._device),
            driver_version=self._text("nvmlSystemGetDriverVersion"),
            cuda_version=self._cuda_version(),
            temperature_c=self._unsigned("nvmlDeviceGetTemperature", self._board, c_int(_TEMPERATURE_GPU)),
            power_w=None if power_mw is None else power_mw / 1000,
            ecc_uncorrected=self._ecc_uncorrected(self._board),
            memory_total_bytes=total,
            memory_used_bytes=used,
            memory_free_bytes=free,
            own_memory_bytes=own,
            other_processes=others,
        )

    def close(self) -> None:
        """Ends the session. Harmless when repeated."""
        if self._open:
            self._device = self._board = None
            self._open = False
            self._call("nvmlShutdown")

    def _call(self, name: str, *arguments: object) -> bool:
        """Whether a function is there and succeeded. Its arguments are ctypes values: it has no prototype."""
        if self._library is None:
            return False
        try:
            function = getattr(self._library, name)
        except AttributeError:  # an older driver
            return False
        return bool(function(*arguments) == 0)

    # -- the device ----------------------------------------------------------------------------------------------

    def _find(self, named: str, device_order: str) -> c_void_p | None:
        if named.isdecimal() and len(named) < 6:
            if device_order != "PCI_BUS_ID" and self._count() != 1:
                return None  # NVML counts by bus id
            return self._handle("nvmlDeviceGetHandleByIndex_v2", c_uint(int(named)))
        if _PCI_BUS_ID.fullmatch(named):
            return self._handle("nvmlDeviceGetHandleByPciBusId_v2", ctypes.c_char_p(named.encode()))
        if named.startswith(("GPU-", "MIG-")) and named.isascii():
            exact = self._handle("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(named.encode()))
            return exact if exact is not None else self._beginning_with(named)
        return None

    def _beginning_with(self, prefix: str) -> c_void_p | None:
        """The one GPU whose UUID begins so, as CUDA takes it."""
        found = []
        for index in range(self._count()):
            device = self._handle("nvmlDeviceGetHandleByIndex_v2", c_uint(index))
            uuid = None if device is None else self._text("nvmlDeviceGetUUID", device)
            if uuid is not None and uuid.lower().startswith(prefix.lower()):
                found.append(device)
        return found[0] if len(found) == 1 else None

    def _count(self) -> int:
        return self._unsigned("nvmlDeviceGetCount_v2") or 0

    def _handle(self, function: str, key: object) -> c_void_p | None:
        device = c_void_p()
        return device if self._call(function, key, byref(device)) else None

    # -- what it says --------------------------------------------------------------------------------------------

    def _unsigned(self, function: str, *arguments: object) -> int | None:
        value = c_uint()
        return value.value if self._call(function, *arguments, byref(value)) else None

    def _text(self, function: str, *arguments: object) -> str | None:
        text = (c_char * _TEXT_BYTES)()
        if not self._call(function, *arguments, text, c_uint(_TEXT_BYTES)):
            return None
        return text.value.decode("ascii", "replace")

    def _cuda_version(self) -> str | None:
        version = c_int()  # 13000 is 13.0
        if not self._call("nvmlSystemGetCudaDriverVersion_v2", byref(version)):
            return None
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def _ecc_uncorrected(self, board: c_void_p) -> int | None:
        errors = c_ulonglong()
        which = (c_int(_UNCORRECTED), c_int(_VOLATILE))
        return errors.value if self._call("nvmlDeviceGetTotalEccErrors", board, *which, byref(errors)) else None

    def _memory(self, device: c_void_p) -> tuple[int | None, int | None, int | None]:
        """Total, used and free."""
        memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
        if not self._call("nvmlDeviceGetMemoryInfo_v2", device, byref(memory)):
            return None, None, None
        return memory.total, memory.used, memory.free

    def _processes(self, device: c_void_p) -> tuple[int | None, tuple[GpuProcess, ...] | None]:
        """What this process holds, and the other processes."""
        count, infos = c_uint(_MOST_PROCESSES), (_ProcessInfo * _MOST_PROCESSES)()
        if not self._call("nvmlDeviceGetComputeRunningProcesses_v3", device, byref(count), infos):
            return None, None
        listed = [
            GpuProcess(pid=info.pid, memory_bytes=None if info.memory == _NOT_AVAILABLE else info.memory)
            for info in infos[: count.value]
        ]
        own = next((process.memory_bytes for process in listed if process.pid == os.getpid()), None)
        return own, tuple(process for process in listed if process.pid != os.getpid())


def _load() -> Library | None:
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no NVIDIA driver
        return None


class GpuHealthSampler:
    """Owns the thread that takes a reading every :data:`INTERVAL_S`, and the last one. Thread-safe."""

    def __init__(
        self,
        read: Callable[[], GpuHealth],
        *,
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A sampler that does not run yet.

        Args:
          read: takes a reading, and may block.
          wait: waits so many seconds and says whether to stop.
          clock: monotonic seconds.
        """
        self._stopping = threading.Event()
        self._read, self._wait, self._clock = read, wait or self._stopping.wait, clock
        self._taken: tuple[float, GpuHealth] = (clock(), GpuHealth())
        self._first = threading.Event()
        # A daemon: a thread that NVML holds must not hold the process.
        self._thread = threading.Thread(target=self._run, name="gpu-health", daemon=True)

    def start(self, timeout_s: float = FIRST_S) -> None:
        """Takes the first reading, in the thread, and returns when it is there, or does not come within a time."""
        self._thread.start()
        self._first.wait(timeout_s)

    def latest(self) -> GpuHealth:
        """The last reading, at no cost; all None before the first, and when it is older than :data:`STALE_S`."""
        taken_s, health = self._taken
        return health if self._clock() - taken_s <= STALE_S else GpuHealth()

    def close(self, timeout_s: float = 1.0) -> bool:
        """Stops. False when NVML still holds the thread: then its session must not be closed."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        stop = self._stopping.is_set()
        while not stop:
            health = self._read()
            self._taken = (self._clock(), health)
            self._first.set()
            stop = self._wait(INTERVAL_S)
