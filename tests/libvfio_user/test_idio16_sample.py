"""examples/pci/idio16.py beside libvfio-user's sample of the same card: the same accesses, and what each answers."""

import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from pci.idio16 import Idio16

from vfiouser_virtio.engines import VfioUserEngine
from vfiouser_virtio.libvfio_user.bindings import Library
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_user import Client, connect

PORTS = PciRegion.BAR2
OUTPUTS, INPUTS = (0, 4), (1, 5)
OTHERS = (2, 3, 6, 7)


class WiredAsTheSample(Idio16):
    """The sample's pins count the ones that are written to them, and are up at each third."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0] * 16
        self.inputs = 0xFFFF

    def count(self, offset: int, value: int) -> None:
        for bit in range(8):
            self.counts[bit + 8 * (offset == OUTPUTS[1])] += value >> bit & 1
        self.inputs = sum(1 << pin for pin, count in enumerate(self.counts) if count % 3 == 0)


def sample(library: Library) -> Path:
    found = Path(os.path.realpath(library.path)).parents[1] / "samples" / "gpio-pci-idio-16"
    if not found.is_file():
        pytest.skip(f"libvfio-user was built without its samples: there is no {found}")
    return found


@contextmanager
def running(program: Path, path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([program, "-R", path]) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def both(program: Path, folder: Path, idio: Idio16) -> AsyncIterator[tuple[Client, Client]]:
    """Clients of the sample, and of ours; each has turned decoding on."""
    with running(program, folder / "sample.sock") as process:
        async with serve(PciDeviceFunction(idio), path=folder / "ours.sock", engine=VfioUserEngine()):
            with trio.fail_after(60):
                while not (folder / "sample.sock").exists():
                    assert process.poll() is None
                    await trio.sleep(0.01)
            async with connect(folder / "sample.sock") as theirs, connect(folder / "ours.sock") as ours:
                for client in (theirs, ours):
                    await client.region_write(PciRegion.CONFIG, 4, int(PciCommand.IO).to_bytes(2, "little"))
                yield theirs, ours


async def test_inputs_and_identity_are_the_same(libvfio_user: Library, tmp_path: Path) -> None:
    idio = WiredAsTheSample()
    chance = random.Random(16)
    async with both(sample(libvfio_user), tmp_path, idio) as (theirs, ours):
        for offset, count in ((0, 4), (0x2C, 4)):
            assert await theirs.region_read(PciRegion.CONFIG, offset, count) == await ours.region_read(
                PciRegion.CONFIG, offset, count
            )
        assert (await theirs.region_read(PciRegion.CONFIG, 0x18, 1))[0] & 1 == 1, "ports, as ours"
        for _ in range(2000):
            if chance.random() < 0.5:
                offset, value = chance.choice((*OUTPUTS, *INPUTS, *OTHERS)), chance.getrandbits(8)
                for client in (theirs, ours):
                    await client.region_write(PORTS, offset, bytes([value]))
                if offset in OUTPUTS:
                    idio.count(offset, value)
                continue
            offset = chance.choice(INPUTS)
            answers = [await client.region_read(PORTS, offset, 1) for client in (theirs, ours)]
            assert answers[0] == answers[1], f"{offset:#x}"


async def test_what_the_sample_leaves_out(libvfio_user: Library, tmp_path: Path) -> None:
    """Outputs that read back, interrupts and filters: ours has them as the manual says, the sample answers 0."""
    async with both(sample(libvfio_user), tmp_path, Idio16(loopback=True)) as (theirs, ours):
        answers = {}
        for name, client in (("theirs", theirs), ("ours", ours)):
            await client.region_read(PORTS, 2, 1)
            await client.region_read(PORTS, 3, 1)
            for offset in OUTPUTS:
                await client.region_write(PORTS, offset, b"\xa5")
            answers[name] = [(await client.region_read(PORTS, offset, 1))[0] for offset in (*OUTPUTS, *OTHERS[2:])]
        assert answers == {"theirs": [0, 0, 0, 0], "ours": [0xA5, 0xA5, 0x04, 0xFF]}
        sizes = [(await client.region_info(PORTS)).size for client in (theirs, ours)]
        assert sizes == [0x100, 8]
