"""A shared memory region under Linux's own driver: virtio-pmem has a disk in it, and reads it without messages."""

import hashlib

import pytest
from construct import Int32ul, Int64ul, Struct
from support.vm_devices import booted

from vfiouser_virtio import vm
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.virtio import Device, queue

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SIZE = 16 * MIB
SHMEM_REGION = 0  # VIRTIO_PMEM_F_SHMEM_REGION, and the id of the region (virtio 1.4, 5.19)


class Pmem(Device):
    """Persistent memory, as much as a test needs of it."""

    device_id = 27
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__(
            config=record(Struct("start" / Int64ul, "size" / Int64ul))(start=0, size=0), features=1 << SHMEM_REGION
        )
        self.memory = self.add_shared_memory(SHMEM_REGION, SIZE)
        self.flushes = 0

    async def run(self) -> None:
        async for chain in self.requestq:
            assert Int32ul.parse(chain.readable.read()) == 0  # VIRTIO_PMEM_REQ_TYPE_FLUSH
            self.flushes += 1
            chain.writable.write(Int32ul.build(0))
            chain.complete()


async def test_linux_maps_a_region_and_has_a_disk_in_it(
    qemu: vm.Qemu, guest_image: vm.GuestImage, caplog: pytest.LogCaptureFixture
) -> None:
    pmem = Pmem()
    async with booted(qemu, guest_image, {"pmem0": pmem}) as machine:
        pmem.memory.view[3 * MIB : 3 * MIB + 5] = b"hello"
        read = await machine.run(
            "until [ -b /dev/pmem0 ]; do sleep 0.1; done; dd if=/dev/pmem0 bs=1M skip=3 count=1 | head -c5"
        )
        assert read.strip() == "hello"
        digest = await machine.run("""
            dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
            dd if=/tmp/data of=/dev/pmem0 bs=1M seek=8 conv=fsync 2>/dev/null
            sha256sum </tmp/data
        """)
        assert hashlib.sha256(pmem.memory.view[8 * MIB : 10 * MIB]).hexdigest() == digest.split()[0]
        assert pmem.flushes >= 1
        await machine.check_quiet(caplog)
