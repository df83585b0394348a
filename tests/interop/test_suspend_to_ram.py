"""Suspend-to-RAM (ACPI S3) of a Linux guest: QEMU resets every device, and the drivers go on with what they had."""

import hashlib
import os
import shlex
from pathlib import Path

import pytest
import trio
from benchmarks import fio
from support.vm_devices import MIB, OPEN_PORT, Machine, booted, receive_line, slice_of, sparse, talk

from vfiouser_virtio import vm
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.rng import Rng

pytestmark = pytest.mark.qemu

# Linux 6.1, once. With QEMU's own devices, and with none at all, trixie's 6.12 reboots where it should wake, and the
# second `echo mem` of a 6.1 guest returns at once, without QEMU's SUSPEND.
KERNEL = "bookworm"

# Random reads and writes, sixteen under way, of which those that were written are read back and compared.
LOAD = shlex.join(
    [
        "fio",
        *("--output=/dev/null", "--output-format=terse", "--terse-version=3", "--thread", "--eta=never"),
        *("--name=load", "--filename=/dev/vda", "--ioengine=libaio", "--direct=1", "--iodepth=16"),
        *("--rw=randrw", "--bsrange=4k-64k", "--time_based", "--runtime=9999", "--verify=crc32c", "--verify_fatal=1"),
        *("--verify_backlog=32", "--continue_on_error=none"),
    ]
)
ANSWER = 'while read -r line <&3; do echo "$line too" >&3; done'
# Sectors that have been read and written, of /sys/block/vda/stat.
PROGRESS = "awk '{ print $3, $7 }' /sys/block/vda/stat"


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


@pytest.fixture
def image_with_fio(tmp_path: Path) -> vm.GuestImage:
    return fio.image_with_fio(vm.guest_image(KERNEL), tmp_path)


async def test_everything_goes_on_after_suspend_to_ram(
    qemu: vm.Qemu, image_with_fio: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = sparse(tmp_path / "image", 8 * MIB)
    random = tmp_path / "random"
    random.write_bytes(os.urandom(64 << 10))
    (hvc, hvc_stream), (first, first_stream), (held, held_stream) = pair(), pair(), pair()
    devices = {
        "blk0": Blk(path=image),
        "rng0": Rng(source=random),
        "console0": Console(chardev=[hvc, first, held], name=["", "org.example.first", "held"]),
    }
    async with (
        hvc_stream,
        first_stream,
        held_stream,
        booted(qemu, image_with_fio, devices, append="no_console_suspend") as machine,
    ):
        await machine.run("grep -q deep /sys/power/mem_sleep && echo deep >/sys/power/mem_sleep")
        await machine.run(
            f"(set +e; {LOAD} >/tmp/complaints 2>&1 & echo $! >/tmp/pid; wait $!; echo >/tmp/ended) >/dev/null 2>&1 &"
        )
        # A program that has a port open all the time, and answers each line.
        await machine.run(f"({OPEN_PORT % {'port': 'held'}}{ANSWER}) >/dev/null 2>&1 &")
        before = await progress(machine)
        with trio.fail_after(180):
            await sleep_and_wake(machine)
        with trio.fail_after(120):
            while not all(new > old for new, old in zip(await progress(machine), before, strict=True)):
                await trio.sleep(0.2)
            await held_stream.send_all(b"after\n")
            assert await receive_line(held_stream) == "after too"
        for stream, port in ((hvc_stream, "hvc0"), (first_stream, "org.example.first")):
            await talk(machine, stream, port)
        entropy = (await machine.guest.run("dd if=/dev/hwrng bs=16 count=16 2>/dev/null", check=True)).raw_output
        assert len(entropy) == 256
        assert all(entropy[at : at + 16] in random.read_bytes() for at in range(0, 256, 16))
        # It ends at the first piece that is not what it has written, and says so.
        end = "[ ! -e /tmp/ended ]; kill -KILL $(cat /tmp/pid); until [ -e /tmp/ended ]; do sleep 0.1; done"
        assert await machine.run(f"cat /tmp/complaints; {end}; cat /tmp/complaints") == ""
        digest = (await machine.run("cat /dev/vda | sha256sum")).split()[0]
        assert hashlib.sha256(slice_of(image, 0, 8 * MIB)).hexdigest() == digest
        await machine.check_quiet(caplog)


async def progress(machine: Machine) -> list[int]:
    """How many sectors have been read, and written."""
    return [int(number) for number in (await machine.run(PROGRESS)).split()]
