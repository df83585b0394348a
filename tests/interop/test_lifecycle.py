"""Reboots, drivers that leave and come back, resets, and devices that are busy at the same time."""

import hashlib
import os
from pathlib import Path

import pytest
import trio
from support.amounts import Amounts
from support.vm_devices import MIB, Machine, booted, check_held, held, slice_of, sparse, talk

from vfiouser_virtio import vm
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.rng import Rng

pytestmark = pytest.mark.qemu
both_engines = pytest.mark.usefixtures("engine")


async def use_disk(machine: Machine, image: Path, times: int = 1) -> None:
    """The guest writes other bytes than ever before, and the host has them."""
    for _ in range(times):
        command = """
            dd if=/dev/urandom of=/tmp/data bs=64k count=4
            dd if=/tmp/data of=/dev/vda bs=64k seek=3 oflag=direct
            dd if=/dev/vda bs=64k skip=3 count=4 iflag=direct | cmp - /tmp/data
            sha256sum </tmp/data
        """
        digest = (await machine.run(f"exec 2>/dev/null\n{command}")).split()[0]
        assert hashlib.sha256(slice_of(image, 3 << 16, 4 << 16)).hexdigest() == digest


async def use_entropy(machine: Machine, source: bytes, pieces: int = 64) -> None:
    """What the guest reads is what the host's source has; Linux cuts it into pieces of any multiple of 16 bytes."""
    read = await machine.guest.run(f"dd if=/dev/hwrng bs=16 count={pieces} 2>/dev/null", check=True)
    assert len(read.raw_output) == 16 * pieces
    for at in range(0, 16 * pieces, 16):
        assert read.raw_output[at : at + 16] in source


async def rebind_console_and_entropy(machine: Machine, port: trio.SocketStream, source: bytes, times: int) -> None:
    """Their drivers leave them and come back."""
    await machine.run("mount -t debugfs debugfs /sys/kernel/debug")
    children = (("virtio2", "virtio_console"), ("virtio1", "virtio_rng"))

    async def again(times: int) -> None:
        cycle = "".join(
            f"echo {child} >/sys/bus/virtio/drivers/{driver}/{do}\n"
            for do in ("unbind", "bind")
            for child, driver in children
        )
        # The last control message that the device sends. Linux complains if it is unbound while it handles them.
        ready = "grep -qs 'host_connected: 1' /sys/kernel/debug/virtio-ports/vport2p1"
        await machine.run(f"for i in $(seq {times}); do {cycle} until {ready}; do usleep 20000; done; done")
        await talk(machine, port, "p")
        await use_entropy(machine, source, 8)

    await again(1)
    before = held()
    await again(times)
    await again(times)
    await check_held(before)


@both_engines
async def test_all_devices_work_after_each_reboot(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, amounts: Amounts
) -> None:
    """And when drivers come back, of which the disk has a test of its own."""
    image = sparse(tmp_path / "image", 8 * MIB)
    random = tmp_path / "random"
    random.write_bytes(os.urandom(64 << 10))
    (hvc, hvc_stream), (port, port_stream) = pair(), pair()
    devices = {
        "blk0": Blk(path=image),
        "rng0": Rng(source=random),
        "console0": Console(chardev=[hvc, port], name=["", "p"]),
    }
    async with hvc_stream, port_stream, booted(qemu, guest_image, devices) as machine:
        counts = []
        for boot in range(3):
            if boot:
                await machine.guest.reboot()
            await use_disk(machine, image)
            await use_entropy(machine, random.read_bytes())
            await talk(machine, hvc_stream, "hvc0")
            await talk(machine, port_stream, "p")
            await machine.check_quiet(caplog)
            counts.append(held())
        assert counts[1] == counts[2]
        await rebind_console_and_entropy(machine, port_stream, random.read_bytes(), amounts.rebinds)
        await machine.check_quiet(caplog)


@both_engines
@pytest.mark.parametrize("interrupts", ["msix", pytest.param("intx", marks=pytest.mark.variant)])
async def test_driver_unbound_and_bound_many_times(
    qemu: vm.Qemu,
    guest_image: vm.GuestImage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    interrupts: str,
    amounts: Amounts,
    long_run: bool,
) -> None:
    image = sparse(tmp_path / "image", 8 * MIB)
    async with booted(
        qemu, guest_image, {"blk0": Blk(path=image)}, append="pci=nomsi" if interrupts == "intx" else ""
    ) as machine:
        driver = "/sys/bus/virtio/drivers/virtio_blk"
        again = f"""
            echo virtio0 >{driver}/unbind
            [ ! -e /dev/vda ]
            echo virtio0 >{driver}/bind
            [ -b /dev/vda ]
        """
        await machine.run(again)
        await use_disk(machine, image, times=3)
        before = held()
        for _ in range(5 if long_run else 2):
            await machine.run(f"for i in $(seq {amounts.rebinds}); do {again} done")
            await use_disk(machine, image)
        await check_held(before)

        # The whole PCI function, its BARs and interrupts; and in between a function level reset, which forgets all.
        await machine.run("echo flr >/sys/bus/pci/devices/0000:00:01.0/reset_method")
        again = """
            echo 0000:00:01.0 >/sys/bus/pci/drivers/virtio-pci/unbind
            [ ! -e /dev/vda ]
            echo 1 >/sys/bus/pci/devices/0000:00:01.0/reset
            echo 0000:00:01.0 >/sys/bus/pci/drivers/virtio-pci/bind
            [ -b /dev/vda ]
        """
        for _ in range(3):
            await machine.run(again)
            await use_disk(machine, image)
        await check_held(before)
        await machine.check_quiet(caplog)


@both_engines
async def test_three_devices_at_once(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 * MIB))
    random = tmp_path / "random"
    random.write_bytes(os.urandom(64 << 10))
    port, stream = pair()
    devices = {"blk0": Blk(path=image), "rng0": Rng(source=random), "console0": Console(chardev=[port], name=["p"])}
    sent, received = os.urandom(300_000), bytearray()

    async def send() -> None:
        await stream.send_all(sent)

    async def receive() -> None:
        while len(received) < 4 * MIB:
            received.extend(await stream.receive_some())

    async with stream, booted(qemu, guest_image, devices, cpus=2) as machine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            sums = await machine.run(f"""
                exec 2>/dev/null
                exec 3<>/dev/vport2p0
                dd if=/dev/vda bs=256k count=48 iflag=direct | sha256sum >/tmp/disk &
                dd if=/dev/vda of=/dev/vda bs=256k skip=48 count=4 seek=60 iflag=direct oflag=direct &
                dd if=/dev/hwrng of=/tmp/hwrng bs=16 count=512 &
                head -c {len(sent)} <&3 | sha256sum >/tmp/received &
                dd if=/dev/vda bs=64k count=64 >&3 &
                wait
                cat /tmp/disk /tmp/received
            """)
        disk_sum, received_sum = sums.replace("-", "").split()
        content = image.read_bytes()
        assert disk_sum == hashlib.sha256(content[: 12 * MIB]).hexdigest()
        assert content[12 * MIB : 13 * MIB] == content[15 * MIB :]
        assert received_sum == hashlib.sha256(sent).hexdigest()
        assert bytes(received) == content[: 4 * MIB]
        entropy = (await machine.guest.run("cat /tmp/hwrng", check=True)).raw_output
        source = random.read_bytes()
        assert len(entropy) == 8192
        assert all(entropy[at : at + 16] in source for at in range(0, len(entropy), 16))
        await machine.check_quiet(caplog)
