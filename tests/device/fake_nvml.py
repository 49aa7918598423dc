"""A stand-in for libnvidia-ml, whose functions can fail or be missing."""

# ruff: noqa: N802 - the names are the library's

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NOT_FOUND, NOT_SUPPORTED, INSUFFICIENT_SIZE = 6, 3, 7  # nvml.h
NOT_AVAILABLE = 2**64 - 1

GPUS = ("GPU-aaaa1111-0000-0000-0000-000000000000", "GPU-aaaa2222-0000-0000-0000-000000000000")
MIG = "MIG-cccc3333-0000-0000-0000-000000000000"
BUS_IDS = ("00000000:01:00.0", "00000000:65:00.0")
MIG_HANDLE = 900


def handle_of(index: int) -> int:
    return 100 + index


@dataclass
class FakeNvml:
    """libnvidia-ml with two GPUs, the second cut in slices. Its functions take ctypes values, as the real ones do."""

    broken: frozenset[str] = frozenset()  # these functions fail
    absent: frozenset[str] = frozenset()  # an older driver does not have these
    processes: tuple[tuple[int, int], ...] = ()
    gpus: int = 2
    used: int = 21  # of a whole GPU
    free: int = 84
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("nvml") and name not in self.absent and hasattr(type(self), f"_{name}"):

            def call(*arguments: Any) -> int:
                self.calls.append(name)
                if name in self.broken:
                    return NOT_SUPPORTED
                # What byref() holds: the real library writes through the pointer.
                return int(getattr(self, f"_{name}")(*(getattr(given, "_obj", given) for given in arguments)) or 0)

            return call
        raise AttributeError(name)

    def _nvmlInit_v2(self) -> None: ...
    def _nvmlShutdown(self) -> None: ...

    def _nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count.value = self.gpus

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        device.value = handle_of(index.value)
        return 0 if index.value < self.gpus else NOT_FOUND

    def _nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: Any, device: Any) -> int:
        wanted = bus_id.value.decode().rjust(16, "0")
        for index, known in enumerate(BUS_IDS[: self.gpus]):
            if known == wanted:
                device.value = handle_of(index)
                return 0
        return NOT_FOUND

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        known = {name: handle_of(index) for index, name in enumerate(GPUS[: self.gpus])} | {MIG: MIG_HANDLE}
        if uuid.value.decode() not in known:
            return NOT_FOUND
        device.value = known[uuid.value.decode()]
        return 0

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: Any, parent: Any) -> int:
        parent.value = handle_of(1)
        return 0 if device.value == MIG_HANDLE else NOT_SUPPORTED

    def _nvmlDeviceGetUUID(self, device: Any, text: Any, size: Any) -> None:
        assert size.value == len(text)
        text.value = (MIG if device.value == MIG_HANDLE else GPUS[device.value - handle_of(0)]).encode()

    def _nvmlDeviceGetName(self, device: Any, text: Any, size: Any) -> None:
        del device, size
        text.value = b"NVIDIA H200"

    def _nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> None:
        del size
        text.value = b"580.159.04"

    def _nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> None:
        version.value = 12080

    def _nvmlDeviceGetTemperature(self, board: Any, sensor: Any, celsius: Any) -> int:
        celsius.value = 40 + board.value - handle_of(0)
        return 0 if sensor.value == 0 and board.value != MIG_HANDLE else NOT_SUPPORTED

    def _nvmlDeviceGetPowerUsage(self, board: Any, milliwatts: Any) -> int:
        milliwatts.value = 412_500
        return 0 if board.value != MIG_HANDLE else NOT_SUPPORTED

    def _nvmlDeviceGetTotalEccErrors(self, board: Any, kind: Any, since: Any, errors: Any) -> int:
        errors.value = 2**33
        return 0 if (kind.value, since.value) == (1, 0) and board.value != MIG_HANDLE else NOT_SUPPORTED

    def _nvmlDeviceGetMemoryInfo_v2(self, device: Any, memory: Any) -> int:
        assert memory.version == 0x2000028, "not nvmlMemory_v2"
        used, free, reserved = (3, 12, 5) if device.value == MIG_HANDLE else (self.used, self.free, 35)
        memory.total, memory.used, memory.reserved, memory.free = used + free + reserved, used, reserved, free
        return 0

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, infos: Any) -> int:
        del device
        room, count.value = count.value, len(self.processes)
        if room < len(self.processes):
            return INSUFFICIENT_SIZE
        for index, (pid, memory) in enumerate(self.processes):
            infos[index].pid, infos[index].memory = pid, memory
        return 0
