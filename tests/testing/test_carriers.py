"""What carriers promise besides the behaviour of devices, which tests/behaviour shows over all of them."""

import gc
import os
from typing import Any, cast

import pytest
import trio
from support.libvfio_user_found import find

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.carriers import CARRIERS, LIBRARY_CARRIERS, Carrier, carry, pci_port
from vfiouser_virtio.testing.conversation import Conversation

needs_library = pytest.mark.skipif(find()[0] is None, reason=find()[1])
ALL = [
    pytest.param(
        name,
        marks=[pytest.mark.qemu] * name.startswith("qtest") + [needs_library] * (name in LIBRARY_CARRIERS),
    )
    for name in CARRIERS
]


@pytest.mark.parametrize("carrier", ALL)
async def test_nothing_is_left_behind(carrier: Carrier) -> None:
    held = []
    for _ in range(3):
        async with carry(Rng(), carrier) as device:
            await device.driver_data.read(1)
        del device
        gc.collect()  # memory that is mapped goes with the last view of it
        held.append((len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living))
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("carrier", ALL)
async def test_an_error_of_the_block_comes_out_as_it_is(carrier: Carrier) -> None:
    with pytest.raises(ZeroDivisionError):
        async with carry(Rng(), carrier):
            raise ZeroDivisionError


@pytest.mark.parametrize("carrier", ALL)
async def test_the_device_is_closed(carrier: Carrier) -> None:
    class Closing(Rng):
        closed: int = 0

        def close(self) -> None:
            super().close()
            self.closed += 1

    device = Closing()
    async with carry(device, carrier):
        assert device.closed < 1
    assert device.closed == 1


@pytest.mark.parametrize("carrier", ALL[1:])
async def test_private_memory_is_reached_by_messages(carrier: Carrier) -> None:
    conversation = Conversation("disk")
    async with carry(Blk(size=1 << 20), carrier, conversation=conversation) as device:
        await device.driver_data.read(0, 8)
    text = conversation.text()
    assert (Command.DMA_WRITE.name in text) is carrier.endswith("-private")


async def test_carriers_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no PCI function"):
        async with pci_port(Rng(), "loopback"):
            pass
    with pytest.raises(ConfigError, match="carrier 'pigeon': expected one of loopback, socket"):
        async with carry(Rng(), cast("Any", "pigeon")):
            pass
