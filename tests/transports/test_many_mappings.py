"""A client with many DMA mappings unmaps them, or leaves, while another device of the process is in use."""

import os

import pytest
import trio

from vfiouser_virtio.address_space import Places
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import Entropy, EntropyDriver, bound_pci
from vfiouser_virtio.memory_removal import STEP
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.testing.served import served
from vfiouser_virtio.vfio_user import SharedMemory, connect

PAGE = 4096
STEPS = 8


@pytest.mark.parametrize("leaves", [False, True], ids=["unmaps", "leaves"])
async def test_others_have_their_turns(monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    neighbours: list[int] = []  # how many of the neighbour's registers were read before each step
    reads = 0
    take_out = Places.take_out

    def observed(self: Places, regions: list[object], first: int, last: int) -> None:
        assert last - first <= STEP
        if len(regions) == STEPS * STEP:
            neighbours.append(reads)
        take_out(self, regions, first, last)  # type: ignore[arg-type]  # a list is no list of anything else

    monkeypatch.setattr(Places, "take_out", observed)
    async with served(Rng()) as busy, served(Rng()) as other:
        fd = os.memfd_create("pages", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
        async with connect(other.path) as neighbour, trio.open_nursery() as nursery:

            async def read_on() -> None:
                nonlocal reads
                while True:
                    await neighbour.region_read(PciRegion.CONFIG, 0, 4)
                    reads += 1

            nursery.start_soon(read_on)
            async with connect(busy.path) as client:
                for page in range(STEPS * STEP):
                    await client.dma_map(2 * page * PAGE, PAGE, fd=fd)
                if not leaves:
                    await client.dma_unmap(0, 2 * STEPS * STEP * PAGE)
                    assert len(neighbours) == STEPS
            with trio.fail_after(60):
                while busy.function.memory.regions or len(neighbours) < STEPS:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        os.close(fd)
        assert neighbours[-1] > neighbours[0]
        # The next client is served as ever.
        with SharedMemory(1 << 20) as memory:
            async with (
                connect(busy.path, memory=[memory]) as client,
                bound_pci(client, EntropyDriver()) as device,
            ):
                entropy: Entropy = device.driver_data
                assert len(await entropy.read(16)) == 16


async def test_a_server_that_ends_in_between_unmaps_all() -> None:
    """Cancelled between two steps: the rest is done at once."""
    async with trio.open_nursery() as nursery:
        async with served(Rng()) as busy:
            fd = os.memfd_create("left-behind", os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, PAGE)
            async with connect(busy.path) as client:
                for page in range(STEPS * STEP):
                    await client.dma_map(2 * page * PAGE, PAGE, fd=fd)
                busy.function.memory.unmap(0, STEPS * STEP * PAGE)
                view = busy.function.memory.writable(2 * (STEPS * STEP - 1) * PAGE, 1)[0]
        nursery.cancel_scope.cancel()
    view[0] = 1
    assert os.pread(fd, 1, 0) == b"\0"
    assert "memfd:left-behind" not in _mappings()
    os.close(fd)


def _mappings() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()
