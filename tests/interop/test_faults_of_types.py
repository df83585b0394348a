"""Faults of network devices and consoles as one Linux guest has them all: what it does about each, and nothing else."""

import logging
from pathlib import Path

import pytest
from support.vm_devices import booted_from_options

from vfiouser_virtio import vm
from vfiouser_virtio.faults import FAULTS
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.pci import FaultyPci

pytestmark = [pytest.mark.qemu, pytest.mark.once]

# $n is the number of a device, as in virtio7. Each interface asks the server of its own network all the time.
_FUNCTIONS = r"""
interface() { basename /sys/bus/virtio/devices/virtio$n/net/*; }
ask() {
    ip addr add 10.0.2.$((100 + n))/24 dev $(interface)
    ip link set $(interface) up
    while :; do ping -c 1 -W 1 -I $(interface) 10.0.2.2 || true; done >/tmp/pings-$n 2>&1 &
}
answered() { grep -q "bytes from 10.0.2.2" /tmp/pings-$n; }
counted() { [ $(cat /sys/class/net/$(interface)/$1) -ge $2 ]; }
says() { dmesg | grep -q "virtio$n: $1"; }
ports() { ls /sys/bus/virtio/devices/virtio$n/virtio-ports; }
name() { cat /sys/bus/virtio/devices/virtio$n/virtio-ports/*/name; }
works() { [ "$(name)" = port ] && echo from the guest >/dev/$(ports); }
"""

# Six of twelve frames are spoilt, each in another way.
_FRAMES = [
    f"{fault}:every=12:after={after}"
    for after, fault in enumerate(
        ("net-num-buffers", "net-gso", "net-csum", "net-flags", "net-frame-short", "net-frame-long")
    )
]
# A driver answers some of them, and a device that is answered says more: each time would be for ever.
_MESSAGES = [
    f"{fault}:count=2"
    for fault in (
        "console-port-add",
        "console-port-add:id=1000000",
        "console-message",
        "console-message:id=1000000",
        "console-message-short",
        "console-message-long",
        "console-resize",
    )
]

DEVICES: tuple[tuple[str, list[str], list[str]], ...] = (
    (
        "net,netdev=boot,hash=on",
        [*_FRAMES, "net-hash:every=5"],
        ["counted statistics/rx_frame_errors 3", "counted statistics/rx_length_errors 2", "answered"],
    ),
    (
        "net,netdev=boot",
        ["net-link-flap:every=500ms", "net-announce:every=700ms"],
        ["counted carrier_changes 4", "answered"],
    ),
    ("net,netdev=boot", ["net-ack"], ['says "probe with driver virtio_net failed"']),
    ("net,netdev=boot", [], ["answered"]),
    (
        "console,chardev=file:{folder}/many,name=port",
        _MESSAGES,
        ['says "Request for adding port with out-of-bound id 1000000"', "works"],
    ),
    ("console,chardev=file:{folder}/removed,name=port", ["console-port-remove:at=3"], ['[ -z "$(ports)" ]']),
    ("console,chardev=file:{folder}/named,name=port", ["console-name"], ['[ "$(name)" = ../../../dev/null ]']),
    ("console,chardev=file:{folder}/honest,name=port", [], ["works"]),
)
"""Devices, their faults, and what comes to be true in the guest, which has all of them."""


async def test_what_linux_makes_of_faults_of_a_type(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = [
        ",".join([device.format(folder=tmp_path), *(f"fault={fault}" for fault in faults)])
        for device, faults, _ in DEVICES
    ]
    async with booted_from_options(qemu, guest_image, devices) as machine:
        await machine.run(f"{_FUNCTIONS}\nfor n in 0 1 3; do ask; done")
        for number, (_, _, conditions) in enumerate(DEVICES):
            for condition in conditions:
                wait = f"for i in $(seq 600); do {condition} && exit; sleep 0.1; done; {condition}"
                print(number, condition)
                await machine.run(f"{_FUNCTIONS}\nn={number}\n{wait}")
        assert "Oops" not in (log := await machine.run("dmesg")), log
        assert "WARNING: " not in log, log
        happened = {
            entry["fault"]
            for function in machine.functions.values()
            if isinstance(function, FaultyPci)
            for entry in function.faults.log.entries
        }
        assert happened == {name for name, fault in FAULTS.items() if fault.place in (Place.NET, Place.CONSOLE)}
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name, data in written.items() if data == b"from the guest\n"} == {"many", "honest"}, written
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not said, "the server has complained"
