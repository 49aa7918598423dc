"""How the GPU is: read from a fake of NVML, which may fail in every way; and on a real one, as nvidia-smi says it."""

from __future__ import annotations

import csv
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.device.gpu_health import (
    DRIVER_BYTES,
    GpuHealth,
    GpuHealthSampler,
    GpuProbe,
    GpuProcess,
    foreign_bytes,
)
from tests.device.fake_nvml import BUS_IDS, GPUS, MIG, NOT_AVAILABLE, FakeNvml

WAIT_S = 10.0
GIB = 2**30

FULL = GpuHealth(
    uuid=GPUS[0],
    name="NVIDIA H200",
    driver_version="580.159.04",
    cuda_version="12.8",
    temperature_c=40,
    power_w=412.5,
    ecc_uncorrected=2**33,
    memory_total_bytes=140,
    memory_used_bytes=21,
    memory_free_bytes=84,
    other_processes=(),
)
FUNCTIONS = sorted(name[1:] for name in vars(FakeNvml) if name.startswith("_nvml"))


@pytest.mark.requirement("WORKER-4812")
def test_a_reading_has_everything_in_its_unit() -> None:
    assert GpuProbe("0", library=FakeNvml()).read() == FULL


@pytest.mark.parametrize(
    ("mask", "uuid"),
    [
        ("1", GPUS[1]),
        ("1,0", GPUS[1]),
        (" 0 ", GPUS[0]),
        (GPUS[1], GPUS[1]),
        ("GPU-aaaa2", GPUS[1]),
        ("GPU-AAAA2", GPUS[1]),
        ("00000000:65:00.0", GPUS[1]),
        ("0000:65:00.0", GPUS[1]),
        (MIG, MIG),
    ],
)
def test_the_device_is_the_one_the_mask_names(mask: str, uuid: str) -> None:
    assert GpuProbe(mask, library=FakeNvml()).read().uuid == uuid


@pytest.mark.parametrize(
    "mask",
    ["", "-1", "2", "9" * 40, "GPU-aaaa", "GPU-bbbb", "MIG-dddd", "MIG-é", "0000:66:00.0", "void", "NoDevFiles", "²"],
)
def test_a_mask_that_names_no_device_or_several_reads_nothing(mask: str) -> None:
    assert GpuProbe(mask, library=FakeNvml()).read() == GpuHealth()


def test_an_index_of_another_order_is_believed_only_where_there_is_one_gpu() -> None:
    assert GpuProbe("0", device_order="FASTEST_FIRST", library=FakeNvml()).read() == GpuHealth()
    assert GpuProbe("0", device_order="FASTEST_FIRST", library=FakeNvml(gpus=1)).read() == FULL
    assert GpuProbe(GPUS[1], device_order="FASTEST_FIRST", library=FakeNvml()).read().uuid == GPUS[1]


def test_a_slice_has_its_own_memory_and_the_boards_temperature() -> None:
    health = GpuProbe(MIG, library=FakeNvml()).read()
    assert (health.memory_total_bytes, health.memory_used_bytes, health.usable_memory_bytes) == (20, 3, 15)
    assert (health.temperature_c, health.power_w, health.ecc_uncorrected) == (41, 412.5, 2**33)


@pytest.mark.requirement("WORKER-4210")
def test_other_processes_are_all_but_this_one() -> None:
    library = FakeNvml(processes=((7, 1000), (os.getpid(), 5000), (9, NOT_AVAILABLE), (11, 24)))
    health = GpuProbe("0", library=library).read()
    assert health.other_processes == (
        GpuProcess(pid=7, memory_bytes=1000),
        GpuProcess(pid=9, memory_bytes=None),
        GpuProcess(pid=11, memory_bytes=24),
    )
    assert health.own_memory_bytes == 5000


def test_processes_that_cannot_be_listed_are_not_none_at_all() -> None:
    many = FakeNvml(processes=tuple((pid, 1) for pid in range(1, 5000)))
    for library in (many, FakeNvml(broken=frozenset({"nvmlDeviceGetComputeRunningProcesses_v3"}))):
        health = GpuProbe("0", library=library).read()
        assert health.other_processes is None
        assert foreign_bytes(FULL, health) is None


# -- what others hold --------------------------------------------------------------------------------------------------


def reading(used: int, *processes: tuple[int, int]) -> GpuHealth:
    """As the driver tells it: bytes in use, and who holds how much."""
    return GpuProbe("0", library=FakeNvml(used=used, processes=processes)).read()


OWN = os.getpid()
IDLE = reading(4 * 2**20)


@pytest.mark.requirement("WORKER-4214")
@pytest.mark.parametrize(
    ("before", "now", "foreign"),
    [
        (IDLE, IDLE, 0),
        (IDLE, reading(60 * GIB, (OWN, 60 * GIB - 9 * 2**20)), 0),
        (IDLE, reading(61 * GIB, (OWN, 60 * GIB)), GIB),
        (IDLE, reading(61 * GIB, (OWN, 60 * GIB), (7, GIB // 2)), GIB),
        (reading(GIB), reading(GIB), GIB),
        (reading(GIB), reading(60 * GIB, (OWN, 60 * GIB)), 0),
        (reading(GIB), reading(61 * GIB), GIB),
        (reading(GIB), reading(61 * GIB, (OWN, NOT_AVAILABLE)), GIB),
        (IDLE, reading(3 * GIB, (7, 3 * GIB)), 3 * GIB),
        (reading(GIB), reading(3 * GIB, (7, 3 * GIB)), 3 * GIB),
        (IDLE, reading(5 * 2**20, (OWN, 2**20), (7, 2**20)), 4 * 2**20),
        (IDLE, reading(2**20, (OWN, 2 * 2**20), (7, 2**20)), 2**20),
        (reading(DRIVER_BYTES), reading(0), 0),
        (reading(DRIVER_BYTES + 1), reading(0), DRIVER_BYTES + 1),
    ],
    ids=[
        "nobody",
        "this process alone, and the driver's small change",
        "one that a container is not shown",
        "one that is listed and one that is not",
        "one before this process opens the device",
        "one that has left since",
        "this process not listed",
        "this process listed without its memory",
        "one that came while this process is not listed",
        "the same, after another",
        "a small one that is listed",
        "one listed, the sums not of one moment",
        "the most that counts as nobody",
        "a byte more",
    ],
)
def test_what_is_in_use_and_not_this_processs_own_is_others(before: GpuHealth, now: GpuHealth, foreign: int) -> None:
    assert foreign_bytes(before, now) == foreign


@pytest.mark.requirement("WORKER-4214")
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (GpuHealth(), GpuHealth()),
        (IDLE, GpuHealth()),
        (GpuHealth(), IDLE),
        (IDLE, replace(IDLE, other_processes=None)),
        (IDLE, replace(IDLE, memory_used_bytes=None)),
        (GpuHealth(), reading(GIB, (7, GIB))),
    ],
)
def test_what_the_driver_does_not_tell_is_not_nothing(before: GpuHealth, now: GpuHealth) -> None:
    assert foreign_bytes(before, now) is None


def test_what_was_not_known_before_need_not_be_known_where_the_driver_lists_this_process() -> None:
    assert foreign_bytes(GpuHealth(), reading(3 * GIB, (OWN, GIB))) == 2 * GIB


@pytest.mark.requirement("WORKER-4812")
@given(
    broken=st.frozensets(st.sampled_from(FUNCTIONS)),
    absent=st.frozensets(st.sampled_from(FUNCTIONS)),
    mask=st.sampled_from(["0", GPUS[0], "GPU-aaaa1", BUS_IDS[0], MIG]) | st.text(max_size=20),
)
def test_whatever_fails_costs_its_own_fields_only(broken: frozenset[str], absent: frozenset[str], mask: str) -> None:
    probe = GpuProbe(mask, library=FakeNvml(broken=broken, absent=absent))
    health = probe.read()
    probe.close()
    if mask == "0" and not {"nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2"} & (broken | absent):
        needs = {
            "uuid": "nvmlDeviceGetUUID",
            "name": "nvmlDeviceGetName",
            "driver_version": "nvmlSystemGetDriverVersion",
            "cuda_version": "nvmlSystemGetCudaDriverVersion_v2",
            "temperature_c": "nvmlDeviceGetTemperature",
            "power_w": "nvmlDeviceGetPowerUsage",
            "ecc_uncorrected": "nvmlDeviceGetTotalEccErrors",
            "memory_total_bytes": "nvmlDeviceGetMemoryInfo_v2",
            "memory_used_bytes": "nvmlDeviceGetMemoryInfo_v2",
            "memory_free_bytes": "nvmlDeviceGetMemoryInfo_v2",
            "other_processes": "nvmlDeviceGetComputeRunningProcesses_v3",
        }
        for name, function in needs.items():
            assert getattr(health, name) == (None if function in broken | absent else getattr(FULL, name)), name


def test_a_session_that_was_opened_is_closed_once_and_reads_no_more() -> None:
    library = FakeNvml()
    probe = GpuProbe("0", library=library)
    probe.close()
    probe.close()
    assert library.calls.count("nvmlShutdown") == 1
    assert probe.read() == GpuHealth()


def test_a_session_that_was_never_opened_is_not_closed() -> None:
    library = FakeNvml(broken=frozenset({"nvmlInit_v2"}))
    GpuProbe("0", library=library).close()
    assert library.calls == ["nvmlInit_v2"]


@pytest.mark.requirement("WORKER-4812")
def test_without_an_nvidia_driver_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_such_library)
    probe = GpuProbe("0")
    assert probe.read() == GpuHealth()
    probe.close()


@pytest.mark.requirement("WORKER-4011")
def test_it_asks_neither_jax_nor_cuda() -> None:
    script = (
        "import pathlib, sys; from orcd_jax.device.gpu_health import GpuProbe; GpuProbe('0').read(); "
        "maps = pathlib.Path('/proc/self/maps'); "
        "sys.exit('jax' in sys.modules or maps.exists() and 'libcuda.so' in maps.read_text())"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class Paced:
    """Lets a sampler take one reading for each ``let``; counts what it asked for."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.taken = 0
        self._go, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False

    def read(self) -> GpuHealth:
        self.taken += 1
        return GpuHealth(temperature_c=self.taken)

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self._waiting.release()
        assert self._go.acquire(timeout=WAIT_S)
        return self._stop

    def until_waiting(self) -> None:
        assert self._waiting.acquire(timeout=WAIT_S)

    def let(self, *, stop: bool = False) -> None:
        self._stop = stop
        self._go.release()


@pytest.fixture
def paced() -> Iterator[tuple[Paced, GpuHealthSampler, list[float]]]:
    pace, clock_s = Paced(), [0.0]
    sampler = GpuHealthSampler(pace.read, wait=pace.wait, clock=lambda: clock_s[-1])
    yield pace, sampler, clock_s
    pace.let(stop=True)
    assert sampler.close(WAIT_S)


def test_a_sampler_reads_at_once_and_then_every_five_seconds(
    paced: tuple[Paced, GpuHealthSampler, list[float]],
) -> None:
    pace, sampler, _ = paced
    assert sampler.latest() == GpuHealth()
    sampler.start()
    pace.until_waiting()
    assert (sampler.latest(), pace.taken, pace.waits) == (GpuHealth(temperature_c=1), 1, [5.0])
    for _ in range(100):
        sampler.latest()
    assert pace.taken == 1
    pace.let()
    pace.until_waiting()
    assert (sampler.latest(), pace.waits) == (GpuHealth(temperature_c=2), [5.0, 5.0])


def test_the_first_reading_is_there_when_the_sampler_has_started() -> None:
    """Else the device could be opened before it was known what others hold of it."""
    begun = threading.Event()

    def read() -> GpuHealth:
        assert not begun.wait(0.05)  # whoever starts the sampler waits for this
        return FULL

    sampler = GpuHealthSampler(read)
    sampler.start(WAIT_S)
    begun.set()
    assert sampler.latest() == FULL
    assert sampler.close(WAIT_S)


def test_a_reading_that_is_old_is_not_told(paced: tuple[Paced, GpuHealthSampler, list[float]]) -> None:
    pace, sampler, clock_s = paced
    sampler.start()
    pace.until_waiting()
    clock_s.append(15.0)
    assert sampler.latest() == GpuHealth(temperature_c=1)
    clock_s.append(15.1)
    assert sampler.latest() == GpuHealth()


def test_a_sampler_that_the_driver_holds_does_not_hold_its_owner() -> None:
    entered, freed = threading.Event(), threading.Event()

    def hang() -> GpuHealth:
        entered.set()
        freed.wait(WAIT_S)
        return GpuHealth()

    sampler = GpuHealthSampler(hang)
    sampler.start(timeout_s=0.01)
    assert sampler.latest() == GpuHealth()
    assert entered.wait(WAIT_S)
    assert not sampler.close(timeout_s=0.01)
    freed.set()
    assert sampler.close(WAIT_S)


def test_closing_does_not_wait_for_the_next_reading() -> None:
    taken = threading.Event()

    def read() -> GpuHealth:
        taken.set()
        return GpuHealth()

    sampler = GpuHealthSampler(read)
    sampler.start()
    assert taken.wait(WAIT_S)
    assert sampler.close(timeout_s=4.0)  # less than the five seconds between readings


def test_a_sampler_that_never_ran_can_be_closed() -> None:
    assert GpuHealthSampler(GpuHealth).close()


# -- on a real GPU -----------------------------------------------------------------------------------------------------


def nvidia_smi(*fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    return next(csv.reader([said], skipinitialspace=True))


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4812")
def test_a_real_gpu_is_as_nvidia_smi_says() -> None:
    uuid, name, driver, bus_id, total, ecc = nvidia_smi(
        "uuid", "name", "driver_version", "pci.bus_id", "memory.total", "ecc.errors.uncorrected.volatile.total"
    )
    for mask in ("0", uuid, uuid[:12], bus_id):
        probe = GpuProbe(mask)
        health = probe.read()
        probe.close()
        assert (health.uuid, health.name, health.driver_version) == (uuid, name, driver), mask
        assert health.memory_total_bytes is not None
        assert health.memory_total_bytes // 2**20 == int(total)
        assert health.ecc_uncorrected == (int(ecc) if ecc.isdigit() else None)
        assert health.cuda_version is not None
        assert f"CUDA Version: {health.cuda_version}" in " ".join(
            subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True, timeout=60).stdout.split()
        )


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4812")
def test_what_changes_on_a_real_gpu_is_near_what_nvidia_smi_says() -> None:
    temperature, power, used = map(float, nvidia_smi("temperature.gpu", "power.draw", "memory.used"))
    probe = GpuProbe("0")
    health = probe.read()
    probe.close()
    assert health.temperature_c == pytest.approx(temperature, abs=5)
    assert health.power_w == pytest.approx(power, rel=0.5)
    assert health.memory_used_bytes is not None
    assert health.memory_used_bytes / 2**20 == pytest.approx(used, abs=64)


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4210")
def test_another_process_on_a_real_gpu_is_seen_and_leaves() -> None:
    script = (
        "import os, sys; os.environ['XLA_CLIENT_MEM_FRACTION'] = '0.05'; import jax; "
        "held = jax.numpy.ones((2**28,), 'int8').block_until_ready(); print(flush=True); sys.stdin.read()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    probe = GpuProbe("0")
    before = probe.read()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        during = probe.read()
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait(WAIT_S) == 0
    after = probe.read()
    probe.close()
    assert before.memory_used_bytes is not None
    assert during.memory_used_bytes is not None
    assert during.memory_used_bytes - before.memory_used_bytes > 2**28
    assert during.other_processes is not None
    assert other.pid in {process.pid for process in during.other_processes}
    foreign = foreign_bytes(before, during)
    assert foreign is not None
    assert foreign > 2**28
    assert after.other_processes is not None
    assert other.pid not in {process.pid for process in after.other_processes}


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4210")
def test_this_process_is_not_another(device: jax.Device) -> None:
    probe = GpuProbe("0")
    before = probe.read()
    held = jax.device_put(np.ones((2**28,), np.int8), device).block_until_ready()
    during = probe.read()
    probe.close()
    held.delete()
    assert during.memory_used_bytes is not None
    assert before.other_processes is not None
    assert during.other_processes is not None
    assert during.own_memory_bytes is not None
    assert during.own_memory_bytes > 2**28
    assert {process.pid for process in during.other_processes} <= {process.pid for process in before.other_processes}
