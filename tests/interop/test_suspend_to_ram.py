"""Suspend-to-RAM (ACPI S3) of a Linux guest: QEMU resets every device, and the drivers go on with what they had."""

import hashlib
import os
from pathlib import Path

import pytest
import trio
from support.vm_devices import MIB, Machine, booted, slice_of, sparse, talk

from vfiouser_virtio import vm
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.rng import Rng

pytestmark = pytest.mark.qemu

# Linux 6.1. Trixie's 6.12 was seen to reboot when it should wake, which is not explained yet.
KERNEL = "bookworm"

# Random pieces at random places of one half of the disk, each read back and compared, until /tmp/stop is there. The
# small guest has no fio; this writes with O_DIRECT, so that requests are in flight whenever the guest is frozen.
LOAD = """
    cd /tmp
    number=0
    while [ ! -e /tmp/stop ]; do
        number=$((number + 1))
        dd if=/dev/urandom of=piece$1 bs=64k count=8 2>/dev/null
        dd if=piece$1 of=/dev/vda bs=64k seek=$(($1 * 64 + number % 8 * 8)) oflag=direct 2>/dev/null || break
        dd if=/dev/vda bs=64k skip=$(($1 * 64 + number % 8 * 8)) count=8 iflag=direct 2>/dev/null |
            cmp - piece$1 || break
        echo $number >done$1
    done
    [ -e /tmp/stop ] && echo well >ended$1
"""


async def sleep_and_wake(machine: Machine) -> None:
    """Put the guest to sleep, wake it by QEMU's monitor, and wait until it can be asked again."""
    guest = machine.guest

    async def wake() -> None:
        await guest.qmp.wait_event("SUSPEND")
        await guest.qmp.execute("system_wakeup")
        await guest.qmp.wait_event("WAKEUP")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wake)
        # Linux's reason, if it does not go to sleep, is in its log.
        await machine.run("echo mem >/sys/power/state || { dmesg | tail -n 20; false; }", timeout=120)


async def test_everything_goes_on_after_suspend_to_ram(
    qemu: vm.Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = sparse(tmp_path / "image", 16 * MIB)
    random = tmp_path / "random"
    random.write_bytes(os.urandom(64 << 10))
    (hvc, hvc_stream), (first, first_stream), (second, second_stream) = pair(), pair(), pair()
    devices = {
        "blk0": Blk(path=image),
        "rng0": Rng(source=random),
        "console0": Console(chardev=[hvc, first, second], name=["", "org.example.first", "second"]),
    }
    async with (
        hvc_stream,
        first_stream,
        second_stream,
        booted(qemu, vm.guest_image(KERNEL), devices, append="no_console_suspend") as machine,
    ):
        await machine.run("grep -q deep /sys/power/mem_sleep && echo deep >/sys/power/mem_sleep")
        for number in (0, 1):
            script = f"set -- {number}\n{LOAD}"
            await machine.run(f"cat >/tmp/load{number} <<'END'\n{script}\nEND\nsh /tmp/load{number} >/dev/null 2>&1 &")
        before = await progress(machine)
        with trio.fail_after(180):
            await sleep_and_wake(machine)
        with trio.fail_after(120):
            while not all(new > old for new, old in zip(await progress(machine), before, strict=True)):
                await trio.sleep(0.2)
        for stream, port in ((hvc_stream, "hvc0"), (first_stream, "org.example.first"), (second_stream, "second")):
            await talk(machine, stream, port)
        entropy = (await machine.guest.run("dd if=/dev/hwrng bs=16 count=16 2>/dev/null", check=True)).raw_output
        assert len(entropy) == 256
        assert all(entropy[at : at + 16] in random.read_bytes() for at in range(0, 256, 16))
        await machine.run("touch /tmp/stop; until [ -e /tmp/ended0 ] && [ -e /tmp/ended1 ]; do sleep 0.1; done")
        digest = (await machine.run("cat /dev/vda | sha256sum")).split()[0]
        assert hashlib.sha256(slice_of(image, 0, 16 * MIB)).hexdigest() == digest
        await machine.check_quiet(caplog)


async def progress(machine: Machine) -> list[int]:
    """How many pieces each load has written and compared."""
    done = await machine.run("for n in 0 1; do cat /tmp/done$n || echo 0; done 2>/dev/null")
    return [int(line) for line in done.split()]
