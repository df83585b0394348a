"""Accesses that no driver makes, of any width and place: each gives an answer or a PeerError, and finds no bug."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from support.pci_chip import Chip, Driven

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.serving.device_files import import_file

EDU = Path(__file__).parents[2] / "examples" / "pci" / "edu.py"
COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 100, 4096)


def edu() -> PciDevice:
    made: PciDevice = import_file(EDU).Edu()
    return made


@pytest.mark.parametrize("make", [Chip, edu])
async def test_random_accesses(make: Callable[[], PciDevice], caplog: pytest.LogCaptureFixture) -> None:
    random_ = random.Random(7)
    device = make()
    driver = Driven(device)
    function = driver.function
    refused = answered = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        for number in range(4000):
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()
                driver.command(random_.choice((0, 2, 6)) | PciCommand.MEMORY)
            region = random_.choice((0, 0, 0, 0, 1, 2, 3, 7, 8, 9))
            offset = random_.choice((random_.randrange(0x200), random_.randrange(0x1100), 0x3FFF8, 0x40FFE, 0xFFFFE))
            count = random_.choice(COUNTS)
            if region == 7 and offset < 8:
                continue  # the command register is the loop's
            try:
                if random_.random() < 0.5:
                    assert len(function.region_read(region, offset, count)) == count
                else:
                    function.region_write(region, offset, memoryview(random_.randbytes(count)))
                answered += 1
            except PeerError:
                refused += 1
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    function.disconnected()
    assert refused
    assert answered
    bugs = [record.getMessage() for record in caplog.records if "a bug in" in record.getMessage()]
    assert bugs == []
    assert len(caplog.records) < 200
