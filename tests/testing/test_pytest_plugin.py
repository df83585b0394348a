"""The pytest plugin as authors of devices have it: in folders of their own, in a pytest of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from support.command import environment
from support.libvfio_user_found import find

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.engine import LibraryEngine
from vfiouser_virtio.testing import carriers

DEVICE = '''
import time

import trio
from vfiouser_virtio.virtio import Device, queue


class Pattern(Device):
    """An entropy device; ``hangs`` when it is asked to."""

    device_id = 4
    requestq = queue(max_size=8)

    def __init__(self, byte: int = 1, hangs: bool = False, never_yields: bool = False) -> None:
        super().__init__()
        self.byte, self.hangs, self.never_yields = byte, hangs, never_yields

    async def run(self) -> None:
        async for chain in self.requestq:
            while self.never_yields:
                time.sleep(3600)
            if self.hangs:
                await trio.sleep_forever()
            chain.writable.write(bytes([self.byte]) * chain.writable.length)
            chain.complete()
'''
TEST = """
import pytest
from pattern import Pattern

@pytest.fixture
def virtio_device():
    return Pattern(7)

async def test_pattern(virtio_guest):
    assert await virtio_guest.driver_data.read(3) == bytes([7, 7, 7])
"""
TRIO_MODE = "[pytest]\ntrio_mode = true\n"

pytest_plugins = ["pytester"]

Run = Callable[..., str]


@pytest.fixture(scope="session")
def home() -> str:
    """Where QEMU and the guest are cached: pytester changes that."""
    return os.environ["HOME"]


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no libvfio-user, wherever it is."""

    def none() -> None:
        raise ConfigError("libvfio-user: there is none")

    monkeypatch.setattr(carriers, "library_engine", none)


@pytest.fixture
def run(home: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Write files, and run pytest there; gives its output."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, status: int = 0, ini: str = TRIO_MODE, **files: str) -> str:
        pytester.makepyfile(**{"pattern": DEVICE, **files})
        pytester.makeini(ini)
        done = pytester.runpytest_inprocess("-W", "error", *arguments)
        assert done.ret == status
        return done.stdout.str() + done.stderr.str()

    return run


def test_who_does_not_use_it_does_not_pay_for_it() -> None:
    code = "import sys, vfiouser_virtio.testing.pytest_plugin; print({'trio', 'construct', 'mmap'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_device_over_the_carriers_that_need_nothing(run: Run) -> None:
    printed = run("-v", test_it=TEST)
    assert re.findall(r"test_pattern\[(.*)\] PASSED", printed) == ["loopback", "socket", "socket-private"]


@pytest.mark.qemu
def test_a_device_over_all_carriers(run: Run) -> None:
    printed = run("-v", "--virtio-carrier=all", test_it=TEST)
    passed = ["loopback", "socket", "socket-private", "qtest", "qtest-private"]
    assert re.findall(r"test_pattern\[(.*)\] PASSED", printed) == passed
    assert "3 passed, 2 deselected" in run("-m", "not qemu", "--virtio-carrier=all", test_it=TEST)


def test_without_libvfio_user_its_carriers_are_left_out_and_the_header_says_so(run: Run) -> None:
    left_out = "libvfio-user: tests over it are left out: libvfio-user: there is none"
    assert left_out in run("--virtio-carrier=all", "-m", "not qemu", test_it=TEST)
    assert "left out" not in run(test_it=TEST)  # nobody has asked for them
    assert "--virtio-carrier: libvfio-user: there is none" in run(
        "--virtio-carrier=libvfio-user", status=4, test_it=TEST
    )


def test_over_libvfio_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    library, reason = find()
    if library is None:
        pytest.skip(reason)
    monkeypatch.setattr(carriers, "library_engine", lambda: LibraryEngine(library))
    printed = run("-v", "--virtio-carrier=libvfio-user", test_it=TEST)
    assert f"libvfio-user: {library.path}: {library.version}" in printed
    assert re.findall(r"test_pattern\[(.*)\] PASSED", printed) == ["libvfio-user"]
    failed = run("--virtio-carrier=libvfio-user", status=1, test_it=TEST.replace("Pattern(7)", "Pattern(8)"))
    assert "→ REGION_WRITE (no reply) BAR4+0x3000 notify queue 0 = 0x0000" in failed


def test_chosen_carriers(run: Run) -> None:
    printed = run("-v", "--virtio-carrier=socket", "--virtio-carrier", "loopback", test_it=TEST)
    assert re.findall(r"test_pattern\[(.*)\] PASSED", printed) == ["loopback", "socket"]
    printed = run("-v", ini=f"{TRIO_MODE}virtio_carriers = socket-private\n", test_it=TEST)
    assert re.findall(r"test_pattern\[(.*)\] PASSED", printed) == ["socket-private"]
    assert "no virtio carrier pigeon: expected loopback, " in run("--virtio-carrier=pigeon", status=4, test_it=TEST)


def test_parameters(run: Run) -> None:
    test = """
import pytest
from pattern import Pattern

@pytest.fixture
def virtio_device():
    return Pattern(9)

@pytest.mark.trio
@pytest.mark.virtio_carriers("socket", "socket-private")
@pytest.mark.parametrize("virtio_interrupts", ["intx", "poll"])
async def test_marked(virtio_guest, virtio_interrupts):
    assert virtio_guest.ids.vendor == 0x5000
    assert virtio_guest.transport.interrupts == virtio_interrupts
    assert await virtio_guest.driver_data.read(3) == bytes([9, 9, 9])

@pytest.mark.trio
@pytest.mark.parametrize("virtio_carrier", ["loopback"])
async def test_carrier(virtio_guest, virtio_carrier):
    assert virtio_guest.transport.name == "loopback"
"""
    # Without trio_mode, and with everything strict.
    assert "5 passed" in run("--strict-markers", "--virtio-ids=2007", ini="[pytest]\n", test_it=test)


def test_a_failure_shows_the_conversation(run: Run) -> None:
    printed = run("--virtio-carrier=all", "-m", "not qemu", status=1, test_it=TEST.replace("Pattern(7)", "Pattern(8)"))
    assert printed.count("assert b'\\x08\\x08\\x08' == b'\\x07\\x07\\x07'") >= 3
    sections = printed.split("- conversation with pattern -")[1:]
    assert len(sections) == 3
    loopback, socket, private = sections
    assert "→ write_status(0xf)" in loopback
    assert "→ notify(0x0)" in loopback
    assert "→ REGION_WRITE BAR4+0x14 device_status = 0x0f" in socket
    assert "flags=READ|WRITE offset=0 address=0x100000000 size=0x1000000 with 1 fd" in socket
    assert "→ REGION_WRITE (no reply) BAR4+0x3000 notify queue 0 = 0x0000" in socket
    assert re.search(r"← DMA_WRITE 0x10\w+ = 08 08 08\n", private)


def test_a_success_shows_nothing(run: Run) -> None:
    assert "conversation" not in run("-rA", test_it=TEST)


def test_a_device_that_does_not_answer(run: Run) -> None:
    test = TEST.replace("Pattern(7)", "Pattern(hangs=True)")
    printed = run(ini=f"{TRIO_MODE}virtio_timeout = 4\n", status=1, test_it=test)
    assert printed.count("TimeoutError: the test has not ended within 4 s") >= 3
    assert "→ REGION_WRITE (no reply) BAR4+0x3000 notify queue 0" in printed


def test_a_device_that_does_not_yield(run: Run) -> None:
    test = TEST.replace("Pattern(7)", "Pattern(never_yields=True)")
    printed = run(ini=f"{TRIO_MODE}virtio_timeout = 4\n", status=1, test_it=test)
    assert printed.count("the device has not yielded for 4 s") >= 3
    assert len(re.findall(r'File ".*/pattern.py", line \d+, in run\n.*    time.sleep\(3600\)', printed)) >= 3
    assert "→ REGION_WRITE (no reply) BAR4+0x3000 notify queue 0" in printed


def test_no_device(run: Run) -> None:
    test = "async def test_it(virtio_guest):\n    pass\n"
    assert "test_it[loopback]: no device under test: write a fixture virtio_device" in run(status=1, test_it=test)


def test_a_device_on_a_socket(run: Run) -> None:
    test = """
import pytest
from pattern import Pattern
from vfiouser_virtio.vfio_user import connect

@pytest.fixture
def virtio_device():
    return Pattern()

async def test_socket(vfio_device):
    async with connect(vfio_device.path) as client:
        assert await client.config_read(0, 4) == 0x1044_1AF4
    assert isinstance(vfio_device.device, Pattern)
"""
    assert "1 passed" in run(test_it=test)


def test_drivers_of_ones_own(run: Run) -> None:
    test = """
import pytest
from pattern import Pattern
from vfiouser_virtio.guest import VirtioDriver, VirtioId

class Mine(VirtioDriver):
    name = "mine"
    id_table = (VirtioId(device=0x1044),)

    async def probe(self, device):
        await device.negotiate(0)
        device.driver_data = "mine"

    async def remove(self, device):
        pass

@pytest.fixture
def virtio_drivers():
    return [Mine()]

@pytest.fixture
def virtio_device():
    return Pattern()

async def test_driver(virtio_guest):
    assert virtio_guest.driver_data == "mine"
"""
    assert "3 passed" in run(test_it=test)


def test_it_may_be_named_again(run: Run) -> None:
    plugin = "vfiouser_virtio.testing.pytest_plugin"
    assert "3 passed" in run("-p", plugin, test_it=TEST)
    assert "3 passed" in run(test_it=TEST, conftest=f"pytest_plugins = ['{plugin}']\n")


def test_the_kernel_is_chosen(run: Run) -> None:
    test = TEST.replace("test_pattern(virtio_guest)", "test_pattern(virtio_guest_image)")
    assert "ConfigError: " in (printed := run("--guest-kernel=/nowhere/bzImage", status=1, test_it=test))
    assert "/nowhere/bzImage" in printed


@pytest.mark.qemu
def test_a_linux_guest(run: Run) -> None:
    test = """
import pytest
from pattern import Pattern

@pytest.fixture
def virtio_device():
    return Pattern(65)

@pytest.mark.guest(memory="private", append="pci=nomsi")
async def test_linux(guest, vfio_device):
    result = await guest.run("head -c 3 /dev/hwrng; cat /proc/cmdline; lspci -n")
    assert result.output.startswith("AAA")
    assert "pci=nomsi" in result.output
    assert "5000:1044" in result.output
    assert "DMA_WRITE" in vfio_device.conversation.text()
"""
    assert "1 passed" in run("--virtio-ids=2007", test_it=test)
    assert "1 deselected" in run("-m", "not qemu", status=5, test_it=test)


FAULTS_TEST = """
import pytest
from pattern import Pattern
from vfiouser_virtio.guest import DeviceBroken

@pytest.fixture
def virtio_device():
    return Pattern(7)

@pytest.mark.virtio_faults("used-id-out-of-range:at=3:id=999", seed=7)
async def test_the_driver_finds_it(virtio_guest, virtio_faults):
    assert virtio_faults.seed == 7
    await virtio_guest.driver_data.read(2)
    virtio_faults.stop()
    with pytest.raises(DeviceBroken, match="0x3e7"):
        for _ in range(100):
            virtio_faults.start()
            await virtio_guest.driver_data.read_some(1)
    assert [entry["n"] for entry in virtio_faults.log.entries if "fault" in entry] == [3]

@pytest.mark.virtio_faults("used-len-long:at=1:len=5")
async def test_the_driver_does_not(virtio_guest):
    assert await virtio_guest.driver_data.read(1) == b"\\0"
"""


def test_faults(run: Run) -> None:
    """They are in the report of a test that fails; a test without the mark has none."""
    printed = run("-v", status=1, test_it=FAULTS_TEST, test_other=TEST)
    carriers_of = "loopback", "socket", "socket-private"
    for name in carriers_of:
        assert f"test_the_driver_finds_it[{name}] PASSED" in printed
        assert f"test_the_driver_does_not[{name}] FAILED" in printed
        assert f"test_pattern[{name}] PASSED" in printed
    assert printed.count("used-len-long, n=1 of queue 0: 0x0: length 0x5, for which it has room for 0x") == 3
