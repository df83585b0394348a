"""A driver of ours boots from the boot netdev, over every carrier: a lease, and a file by TFTP."""

from pathlib import Path

import pytest
import trio
from support.boot_client import ACK, CLIENT, DISCOVER, MAC, REQUEST, SERVER, dhcp, download, packed, read_dhcp

from vfiouser_virtio.backends.net.boot.netdev import BootNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.guest import VirtioDevice
from vfiouser_virtio.guest.drivers.net import NetInterface

FILE = bytes((at * 5 + (at >> 8)) & 0xFF for at in range(50_000))


@pytest.fixture
def virtio_device(tmp_path: Path) -> Net:
    (tmp_path / "kernel").write_bytes(FILE)
    return Net(netdev=BootNetdev(tftp=tmp_path, bootfile="kernel"), mac=MAC.hex(":"))


async def test_a_lease_and_a_file(virtio_guest: VirtioDevice) -> None:
    guest: NetInterface = virtio_guest.driver_data

    async def receive() -> bytes:
        return (await guest.receive()).data

    with trio.fail_after(120):
        await guest.send(dhcp(DISCOVER))
        offer = read_dhcp(await receive())
        assert offer.yiaddr == CLIENT
        await guest.send(dhcp(REQUEST, {50: packed(offer.yiaddr), 54: packed(SERVER)}))
        lease = read_dhcp(await receive())
        assert (lease.type, lease.file) == (ACK, "kernel")
        for options in ({}, {"blksize": 1468, "windowsize": 8, "tsize": 0}):
            data, _ = await download(guest.post, receive, lease.file, options)
            assert data == FILE
