"""Faults as a Linux guest has them: it says what it has found, others are not touched, and the server is sound."""

import logging

import pytest
from support.vm_devices import Machine, booted_from_options

from vfiouser_virtio import vm
from vfiouser_virtio.faults.pci import FaultyPci

pytestmark = [pytest.mark.qemu, pytest.mark.once]

# Each reads its disk in requests of 64 KiB, of which none may ever end.
_READ = "(dd if=/dev/{0} of=/dev/null bs=64k iflag=direct 2>&1 | tail -n 1 >/tmp/{0}.tmp; mv /tmp/{0}.tmp /tmp/{0}) &"
# Linux has read its disks' partition tables by then.
_AT = 150

FAULTS = {
    "vda": (f"used-id-out-of-range:at={_AT}:id=999", "virtio0: req.0:id 999 out of range"),
    "vdb": (f"used-id-not-in-flight:at={_AT}", "virtio1: req.0:id [0-9]* is not a head!"),
    "vdc": (f"used-twice:at={_AT}", "virtio2: req.0:id [0-9]* is not a head!"),
    "vdd": ("config-value:field=capacity:value=0", r"virtio3: \[vdd\] 0 512-byte logical blocks"),
    "vde": ("features-refused", "virtio4: virtio: device refuses features"),
}
"""By what would be the disk's name: its fault, and a line of the kernel's, for grep."""


async def wait_for(machine: Machine, condition: str) -> None:
    await machine.run(f"for i in $(seq 600); do {condition} && break; sleep 0.1; done; {condition}")


async def test_what_linux_makes_of_faults(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    devices = [f"blk,size=16M,fault={fault}" for fault, _ in FAULTS.values()]
    # These two get through.
    devices.append(
        "blk,size=16M,fault=used-late:every=20:time=10ms,fault=interrupt-storm:every=10:times=20,fault-seed=1"
    )
    devices.append("blk,size=16M")
    async with booted_from_options(qemu, guest_image, devices) as machine:
        present = (await machine.run("ls /sys/block")).split()
        disks = [name for name in present if name.startswith("vd")]
        assert len(disks) == len(devices) - 1, "the one whose features are refused is none"
        *_, slow, neighbour = disks
        await machine.run("\n".join(_READ.format(name) for name in disks))
        for name, (fault, line) in FAULTS.items():
            await wait_for(machine, f'dmesg | grep -q "{line}"')
            assert fault, name
        for name in (slow, neighbour):
            await wait_for(machine, f"[ -e /tmp/{name} ]")
            assert await machine.run(f"cat /tmp/{name}") == "256+0 records out"
        # Each fault has happened as often as it should, and the others live on.
        logs = {}
        for name, function in machine.functions.items():
            if isinstance(function, FaultyPci):
                logs[name] = [(entry["fault"], entry["n"]) for entry in function.faults.log.entries]
        assert list(logs) == [f"blk{number}" for number in range(6)]
        for name, fault in (
            ("blk0", "used-id-out-of-range"),
            ("blk1", "used-id-not-in-flight"),
            ("blk2", "used-twice"),
        ):
            assert logs[name] == [(fault, _AT)]
        assert ("features-refused", 1) in logs["blk4"]
        assert {fault for fault, _ in logs["blk5"]} == {"used-late", "interrupt-storm"}
        again = await machine.run(f"dd if=/dev/{neighbour} of=/dev/null bs=1M iflag=direct 2>&1 | tail -n 1")
        assert again == "16+0 records out"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in said if "refused" not in line], "the server has complained about something else"
