"""NvmlGpuProvider against a false libnvidia-ml, built here from C: our way through the binding and every error it can meet.

It proves our calls and error handling, not NVIDIA's behaviour. The library reads the file named by FAKE_NVML at every call;
without that file it answers "driver not loaded", so it changes nothing for other tests in this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.ports import GpuInventory, GpuProvider
from nodeservice.testing.fake_gpu import FakeGpuProvider, fake_gpu

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One line a key: init=N  fail=N  hang=FILE  gpu=UUID,NAME,BUS,TOTAL,USED,UTIL,ERROR */
typedef struct { char uuid[80], name[80], bus[32]; unsigned long long total, used; int util, error; } gpu_t;
static gpu_t gpus[16];
static int count, init_error, fail_error, inits, no_memory_v2;
static char hang[512];

static int load(void) {
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[600];
  count = init_error = fail_error = no_memory_v2 = 0;
  hang[0] = 0;
  if (!file) return 9;
  while (fgets(line, sizeof line, file)) {
    gpu_t *g = &gpus[count];
    line[strcspn(line, "\n")] = 0;
    sscanf(line, "init=%d", &init_error);
    sscanf(line, "fail=%d", &fail_error);
    sscanf(line, "no_memory_v2=%d", &no_memory_v2);
    sscanf(line, "hang=%511s", hang);
    if (sscanf(line, "gpu=%79[^,],%79[^,],%31[^,],%llu,%llu,%d,%d", g->uuid, g->name, g->bus, &g->total, &g->used,
               &g->util, &g->error) == 7) count++;
  }
  fclose(file);
  while (hang[0] && access(hang, F_OK) == 0) usleep(2000);
  return 0;
}
static int enter(void) { int e = load(); return e ? e : (inits <= 0 ? 1 : fail_error); }

int nvmlInitWithFlags(unsigned flags) { int e = load(); if (!e) e = init_error; if (!e) inits++; return e; }
int nvmlShutdown(void) { if (inits <= 0) return 1; inits--; return 0; }
int fake_inits(void) { return inits; }
const char *nvmlErrorString(int code) { return "fake"; }
int nvmlSystemGetDriverVersion(char *out, unsigned n) { int e = enter(); if (!e) snprintf(out, n, "580.65.06"); return e; }
int nvmlDeviceGetCount_v2(unsigned *out) { int e = enter(); if (!e) *out = count; return e; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {
  int e = enter();
  if (!e && i >= (unsigned)count) e = 2;
  if (!e) e = gpus[i].error;
  if (!e) *out = &gpus[i];
  return e;
}
static int tell(char *out, unsigned n, const char *text) { int e = enter(); if (!e) snprintf(out, n, "%s", text); return e; }
int nvmlDeviceGetUUID(gpu_t *g, char *out, unsigned n) { return tell(out, n, g->uuid); }
int nvmlDeviceGetName(gpu_t *g, char *out, unsigned n) { return tell(out, n, g->name); }
int nvmlDeviceGetMemoryInfo(gpu_t *g, unsigned long long *out) {
  int e = enter();
  if (!e) { out[0] = g->total; out[1] = g->total - g->used; out[2] = g->used; }
  return e;
}
int nvmlDeviceGetMemoryInfo_v2(gpu_t *g, void *out) {
  struct { unsigned version; unsigned long long total, reserved, free, used; } *m = out;
  int e = enter();
  if (!e && no_memory_v2) e = 13;
  if (!e && m->version != 0x02000028) e = 25;
  if (!e) { m->total = g->total; m->reserved = 0; m->free = g->total - g->used; m->used = g->used; }
  return e;
}
int nvmlDeviceGetUtilizationRates(gpu_t *g, unsigned *out) {
  int e = enter();
  if (!e && g->util < 0) e = 3;
  if (!e) { out[0] = g->util; out[1] = 0; }
  return e;
}
int nvmlDeviceGetPciInfo_v3(gpu_t *g, char *out) {
  int e = enter();
  if (!e) { memset(out, 0, 68); snprintf(out + 36, 32, "%s", g->bus); }
  return e;
}
"""

A = "gpu=GPU-aaaa,NVIDIA H200,00000000:1B:00.0,150754820096,1073741824,37,0"
B = "gpu=GPU-bbbb,NVIDIA H200,00000000:0A:00.0,150754820096,0,0,0"


class FakeDriver:
    """The state that the false library reports."""

    def __init__(self, library: Path, state: Path) -> None:
        self.library = str(library)
        self.state = state
        self._handle = ctypes.CDLL(str(library))

    def says(self, *lines: str) -> None:
        """Replace the state in one step, as the library may be reading."""
        fresh = self.state.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.state)

    @property
    def open_sessions(self) -> int:
        return int(self._handle.fake_inits())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the false libnvidia-ml can't be built")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this host has a real libnvidia-ml, which the binding would load instead")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    built = folder / "libnvidia-ml.so.1"
    soname = "-Wl,-soname,libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", soname, "-o", built, folder / "nvml.c"], check=True)
    return built


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    state = tmp_path / "state"
    monkeypatch.setenv("FAKE_NVML", str(state))
    return FakeDriver(library, state)


@pytest.fixture
async def provider(driver: FakeDriver, tmp_path: Path) -> AsyncIterator[NvmlGpuProvider]:
    provider = NvmlGpuProvider(library=driver.library, pci_devices=tmp_path / "no-pci")
    yield provider
    await provider.close()
    assert driver.open_sessions == 0


async def test_without_the_library_there_are_no_gpus_and_the_binding_is_not_even_imported() -> None:
    script = (
        "import asyncio, sys, threading\n"
        "from nodeservice.gpu.nvml import NvmlGpuProvider\n"
        "provider = NvmlGpuProvider(library='libno-such-thing.so.1')\n"
        "inventory = asyncio.run(provider.inventory())\n"
        "assert (inventory.gpus, inventory.error, inventory.driver_version) == ((), None, None), inventory\n"
        "asyncio.run(provider.close())\n"
        "assert 'pynvml' not in sys.modules and threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_gpus_are_read_with_uuid_memory_use_and_address_in_the_order_of_the_bus(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A, B)

    inventory = await provider.inventory()

    assert [gpu.uuid for gpu in inventory.gpus] == ["GPU-bbbb", "GPU-aaaa"]
    assert (inventory.driver_version, inventory.error) == ("580.65.06", None)
    gpu = inventory.gpus[1]
    assert (gpu.name, gpu.pci_address) == ("NVIDIA H200", "00000000:1b:00.0")
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (150754820096, 1073741824)
    assert gpu.utilization_percent == 37.0


async def test_nvml_is_initialised_once_however_often_it_is_asked(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A)

    for _ in range(3):
        await asyncio.gather(*(provider.inventory() for _ in range(4)))

    assert driver.open_sessions == 1
    assert sum(thread.name == "nodeservice-nvml" for thread in threading.enumerate()) == 1


async def test_a_library_without_driver_and_hardware_is_no_error(driver: FakeDriver, provider: NvmlGpuProvider) -> None:
    driver.says("init=9")

    assert await provider.inventory() == GpuInventory()


async def test_hardware_whose_driver_is_not_loaded_is_an_error_with_its_remedy(
    driver: FakeDriver, tmp_path: Path
) -> None:
    driver.says("init=9")
    device = tmp_path / "pci/0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    provider = NvmlGpuProvider(library=driver.library, pci_devices=tmp_path / "pci")

    inventory = await provider.inventory()

    assert inventory.gpus == ()
    assert inventory.error is not None
    assert "modprobe nvidia" in inventory.error
    await provider.close()


@pytest.mark.parametrize(
    ("code", "remedy"), [(4, "access to /dev/nvidiactl"), (17, "cgroup"), (18, "restart the machine"), (999, "dmesg")]
)
async def test_a_broken_driver_is_an_error_with_its_remedy_and_not_an_absent_one(
    driver: FakeDriver, provider: NvmlGpuProvider, code: int, remedy: str
) -> None:
    driver.says(f"init={code}")

    inventory = await provider.inventory()

    assert inventory.gpus == ()
    assert inventory.error is not None
    assert f"(NVML error {code})" in inventory.error
    assert remedy in inventory.error


async def test_a_driver_that_breaks_later_is_an_error_and_one_that_recovers_is_used_again(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A)
    assert (await provider.inventory()).error is None

    driver.says(A, "fail=999")
    broken = await provider.inventory()
    driver.says(A)
    healed = await provider.inventory()

    assert broken.error is not None
    assert (len(healed.gpus), healed.error) == (1, None)


async def test_a_lost_gpu_is_named_and_the_others_are_still_listed(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A, B.replace(",0,0,0", ",0,0,15"))

    inventory = await provider.inventory()

    assert [gpu.uuid for gpu in inventory.gpus] == ["GPU-aaaa"]
    assert inventory.error is not None
    assert inventory.error.startswith("GPU 1: a GPU has fallen off the bus")


async def test_a_gpu_that_may_not_be_opened_is_not_ours_and_no_error(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A, B.replace(",0,0,0", ",0,0,4"))

    inventory = await provider.inventory()

    assert [gpu.uuid for gpu in inventory.gpus] == ["GPU-aaaa"]
    assert inventory.error is None


async def test_what_the_driver_does_not_tell_is_unknown(driver: FakeDriver, provider: NvmlGpuProvider) -> None:
    driver.says("no_memory_v2=1", A.replace(",37,0", ",-1,0"))

    (gpu,) = (await provider.inventory()).gpus

    assert gpu.utilization_percent is None
    assert gpu.memory_used_bytes == 1073741824


async def test_a_driver_that_hangs_blocks_nobody_and_the_last_inventory_comes_with_an_error(
    driver: FakeDriver, tmp_path: Path
) -> None:
    provider = NvmlGpuProvider(library=driver.library, pci_devices=tmp_path, timeout_seconds=0.05)
    driver.says(A)
    while (await provider.inventory()).error is not None:
        """The first look also imports the binding."""
    hang = tmp_path / "hang"
    hang.touch()
    driver.says(A, f"hang={hang}")

    hung = await provider.inventory()
    with pytest.raises(StopIteration) as at_once:
        # A call that hangs already must not be waited for again: the coroutine ends without ever being suspended.
        provider.inventory().send(None)
    again = at_once.value.value

    for inventory in (hung, again):
        assert [gpu.uuid for gpu in inventory.gpus] == ["GPU-aaaa"]
        assert inventory.error is not None
        assert "has not answered" in inventory.error
    hang.unlink()
    async with asyncio.timeout(10):
        while (await provider.inventory()).error is not None:
            await asyncio.sleep(0.01)
    await provider.close()


async def test_closing_twice_is_harmless_and_the_last_inventory_stays(
    driver: FakeDriver, provider: NvmlGpuProvider
) -> None:
    driver.says(A)
    last = await provider.inventory()

    await provider.close()
    await provider.close()

    assert await provider.inventory() == last


async def test_the_fake_answers_as_the_real_provider_does() -> None:
    fakes: list[GpuProvider] = [FakeGpuProvider(), FakeGpuProvider(fake_gpu(0), fake_gpu(1))]
    none, two = [await fake.inventory() for fake in fakes]

    assert none == GpuInventory()
    assert len({gpu.uuid for gpu in two.gpus}) == 2
    assert two.error is None
    for fake in fakes:
        await fake.close()
        await fake.close()
