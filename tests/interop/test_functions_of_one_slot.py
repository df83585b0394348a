"""Several functions of one slot, from the start and plugged in while Linux runs: one socket for each."""

import json

import pytest

from vfiouser_virtio import serve, vm
from vfiouser_virtio.serving.qemu_command import hotplug_commands

pytestmark = [pytest.mark.qemu, pytest.mark.variant]

ROOT_PORT = ["-device", "pcie-root-port,id=rp1,chassis=1,slot=1,addr=8.0"]
VENDORS = "until [ -e {0}.0/virtio* -a -e {0}.1/virtio* ]; do sleep 0.1; done; cat {0}.[01]/device"


async def test_linux_finds_functions_of_one_slot(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    async with (
        serve("rng,addr=6.1", "console,chardev=null,addr=6.0") as served,
        serve("rng,id=late0,bus=rp1,addr=0.0", "console,id=late1,chardev=null,bus=rp1,addr=0.1") as plugged,
        vm.boot_guest(qemu, guest_image, devices=served.qemu_devices, extra_args=ROOT_PORT) as guest,
    ):

        async def run(command: str) -> str:
            return (await guest.run(f"cd /sys/bus/pci/devices && {command}", check=True)).output

        assert (await run(VENDORS.format("0000:00:06"))).split() == ["0x1043", "0x1044"]
        bus = (await run("cat 0000:00:08.0/secondary_bus_number")).strip()
        for line in hotplug_commands(plugged.qemu_devices).splitlines():
            arguments = json.loads(line)["arguments"]
            await guest.qmp.execute("device_add", **arguments)
        assert (await run(VENDORS.format(f"0000:{int(bus):02x}:00"))).split() == ["0x1044", "0x1043"]
