"""The memory balloon in a Linux guest: the file of its RAM shrinks on the host, and grows again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from support.vm_devices import MIB, Machine, booted

from vfiouser_virtio import vm
from vfiouser_virtio.devices.balloon import Balloon

pytestmark = pytest.mark.qemu

BALLOON = 64 * MIB
# Every page of the guest's RAM that is to be had for it, so that each is there on the host.
FILL = """
mount -o remount,size=100% /tmp
free=$(awk '/MemAvailable/ { print int($2 / 1024) - 80 }' /proc/meminfo)
dd if=/dev/zero of=/tmp/fill bs=1M count=$free 2>/dev/null
"""


def ram_on_the_host(machine: Machine) -> int:
    """Bytes of the memfd of QEMU that is the guest's RAM which are there, and no hole."""
    files = (file.stat() for file in Path(f"/proc/{machine.guest.process.pid}/fd").iterdir() if is_memfd(file))
    return max(status.st_blocks * 512 for status in files)


def is_memfd(file: Path) -> bool:
    try:
        return os.readlink(file).startswith("/memfd:")
    except OSError:
        return False


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(90):
        while not condition():
            await trio.sleep(0.1)
        return
    raise AssertionError(f"{what} does not come")


async def wait_free(balloon: Balloon, size: int) -> None:
    """Wait until the guest says that so much is free: what it frees lies in lists of each CPU at first."""
    with trio.fail_after(60):
        while (await balloon.statistics())["memfree"] < size:
            await trio.sleep(0.2)


@pytest.mark.variant  # the plain run has tests/behaviour/test_balloon.py
async def test_ram_goes_back_to_the_host_and_comes_again(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    balloon = Balloon(free_page_hint=True, deflate_on_oom=True)
    reporting = Balloon(free_page_reporting=True)
    async with booted(qemu, guest_image, {"inflates": balloon, "reports": reporting}, memory_size="240M") as machine:
        with trio.fail_after(300):
            await use_it(machine, balloon, reporting)
        await machine.check_quiet(caplog)


async def use_it(machine: Machine, balloon: Balloon, reporting: Balloon) -> None:
    driver = "/sys/bus/virtio/drivers/virtio_balloon"
    # Linux knows one balloon that free pages are reported to; it has its turn later.
    await machine.run(f"[ -e {driver}/virtio0 ]; echo virtio1 >{driver}/unbind")

    # Statistics are those of /proc/meminfo.
    said = await balloon.statistics()
    seen = dict(line.split()[:2] for line in (await machine.run("cat /proc/meminfo")).splitlines())
    assert said["memtot"] == int(seen["MemTotal:"]) * 1024
    assert {"memfree", "avail", "caches", "majflt", "minflt"} <= said.keys()
    assert 0 < said["memfree"] <= said["avail"] + 64 * MIB < said["memtot"] + 64 * MIB

    # Inflate: what was there is there no more.
    await machine.run(FILL, timeout=200)
    await machine.run("rm /tmp/fill")
    full = ram_on_the_host(machine)
    balloon.set_target(BALLOON)
    await balloon.wait_actual()
    assert balloon.handed_back == BALLOON
    assert balloon.ignored == 0
    assert ram_on_the_host(machine) <= full - BALLOON + 4 * MIB
    free = (await balloon.statistics())["memfree"]

    # Deflate: Linux has it again, and what it writes there comes back.
    balloon.set_target(BALLOON // 4)
    await balloon.wait_actual(BALLOON // 4)
    await wait_free(balloon, free + BALLOON // 2)
    balloon.set_target(0)
    await balloon.wait_actual(0)
    await machine.run(FILL, timeout=200)
    assert ram_on_the_host(machine) >= full - 8 * MIB
    await machine.run("rm /tmp/fill")

    # Hints: most of what is free, and it is still the guest's.
    async with balloon.free_page_hints() as ranges:
        assert sum(length for _, length in ranges) > BALLOON
        assert len(ranges) == len({address for address, _ in ranges})
    await wait_free(balloon, BALLOON)

    # Reports: free pages go back by themselves.
    await machine.run(FILL, timeout=200)
    full = ram_on_the_host(machine)
    await machine.run(f"echo virtio0 >{driver}/unbind; echo virtio1 >{driver}/bind; rm /tmp/fill")
    await wait_until(lambda: ram_on_the_host(machine) < full - BALLOON, "free page reporting")
    # It is counted when a request has ended, which is after the host has the pages.
    await wait_until(lambda: reporting.handed_back > BALLOON, "the device's count of what was reported")
    assert reporting.ignored == 0
    data = await machine.run("head -c 40000000 /dev/urandom >/tmp/data; md5sum </tmp/data; sync; md5sum </tmp/data")
    assert len(set(data.split())) == 2, data  # and "-"
