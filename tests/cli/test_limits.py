"""Rate limits of a device that is served, as its users have them. Only what it takes at least is measured."""

from pathlib import Path

import pytest
import trio
from support.command import serve_process

from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.vfio_user import SharedMemory, connect

REQUESTS, BURST, RATE = 30, 5, 50


@pytest.mark.parametrize("supervised", [False, True], ids=["plain", "supervised"])
async def test_a_disk_takes_no_more_than_it_may(supervised: bool, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"\x5a" * (1 << 20))
    device = f"blk,path=disk.img,iops={RATE},iops-burst={BURST}"
    words = ["--supervise"] if supervised else []
    async with serve_process(*words, "--device", device, folder=tmp_path) as served:
        [path] = served.sockets
        with SharedMemory(16 << 20) as memory:
            async with connect(path, memory=[memory]) as client, bound_pci(client) as found:
                began = trio.current_time()
                for sector in range(REQUESTS):
                    assert await found.driver_data.read(sector, 1) == b"\x5a" * 512
                took = trio.current_time() - began
    assert took > (REQUESTS - BURST) / RATE * 0.99
