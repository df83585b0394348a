"""Guest memory: real memfds, real mappings."""

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from vfiouser_virtio.address_space import WINDOW_SIZE
from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.memory_pins import AT_ONCE, Pin, Ranges

PAGE = mmap.PAGESIZE


def memfd(size: int, fill: bytes = b"", name: str = "test") -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, fill, 0)
    return fd


def mapped(
    memory: GuestMemory, address: int, size: int, *, writable: bool = True, fill: bytes = b"", offset: int = 0
) -> int:
    """Map a new memfd and return another descriptor of it, to look at it from the other side."""
    fd = memfd(offset + size, fill)
    kept = os.dup(fd)
    memory.map(address, size, readable=True, writable=writable, fd=fd, offset=offset)
    return kept


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_see_the_same_bytes() -> None:
    memory = GuestMemory()
    fd = mapped(memory, 0x10_0000, 4 * PAGE, fill=b"guest")
    assert bytes(memory.readable(0x10_0000, 5)[0]) == b"guest"
    memory.writable(0x10_0000 + PAGE, 6)[0][:] = b"device"
    assert os.pread(fd, 6, PAGE) == b"device"
    os.close(fd)


@pytest.mark.parametrize("address", [0x10_0000, WINDOW_SIZE - PAGE, 0x2000_0000_0000])
def test_offset_and_far_addresses(address: int) -> None:
    memory = GuestMemory()
    fd = mapped(memory, address, 2 * PAGE, offset=3 * PAGE)
    memory.writable(address + PAGE, 4)[0][:] = b"here"
    assert os.pread(fd, 4, 4 * PAGE) == b"here"
    memory.unmap(address, 2 * PAGE)
    with pytest.raises(Unmapped):
        memory.readable(address, 1)
    os.close(fd)


def test_a_range_across_two_neighbours_is_one_view() -> None:
    memory = GuestMemory()
    low, high = mapped(memory, 0x1000, PAGE), mapped(memory, 0x2000, PAGE)
    (view,) = memory.writable(0x1FFC, 8)
    view[:] = b"lowwhigh"
    assert (os.pread(low, 4, PAGE - 4), os.pread(high, 4, 0)) == (b"loww", b"high")
    os.close(low)
    os.close(high)


def test_a_range_across_windows_is_several_views() -> None:
    memory = GuestMemory()
    low, high = mapped(memory, WINDOW_SIZE - PAGE, PAGE), mapped(memory, WINDOW_SIZE, PAGE)
    assert [len(view) for view in memory.readable(WINDOW_SIZE - 4, 8)] == [4, 4]
    os.close(low)
    os.close(high)


@pytest.mark.parametrize(
    ("address", "length"), [(0xFFF, 1), (0xFFF, 2), (0x2FFF, 2), (0x3000, 1), (0x1000, 1 << 40), (0, 0), (1 << 63, 16)]
)
def test_holes_are_refused(address: int, length: int) -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0x1000, 2 * PAGE))
    with pytest.raises(Unmapped):
        memory.readable(address, length)


def test_read_only_memory() -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0x1000, PAGE, writable=False, fill=b"rom"))
    assert bytes(memory.readable(0x1000, 3)[0]) == b"rom"
    with pytest.raises(Unmapped, match="may not be written"):
        memory.writable(0x1000, 1)


def test_readable_views_cannot_be_written() -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0x1000, PAGE))
    with pytest.raises(TypeError):
        memory.readable(0x1000, 1)[0][0] = 1


def test_a_stale_view_survives_unmap_and_reads_zeros() -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0x1000, PAGE, fill=b"secret"))
    view = memory.readable(0x1000, 6)[0]
    memory.unmap(0x1000, PAGE)
    assert bytes(view) == bytes(6)
    memory.clear()
    assert bytes(view) == bytes(6)


def test_a_view_sees_memory_that_comes_back() -> None:
    memory = GuestMemory()
    fd = mapped(memory, 0x1000, PAGE, fill=b"ring")
    view = memory.readable(0x1000, 4)[0]
    memory.unmap(0, 1 << 32)
    memory.map(0x1000, PAGE, readable=True, writable=True, fd=fd, offset=0)
    assert bytes(view) == b"ring"


def test_unmap_takes_every_region_inside_and_none_is_fine() -> None:
    memory = GuestMemory()
    for address in (0x1000, 0x3000, 0x8000):
        os.close(mapped(memory, address, PAGE))
    assert memory.unmap(0xFEF0_0000, 0xFFFF_FFFF_0110_0000) is None
    memory.unmap(0, 0x4000)
    assert [region.address for region in memory.regions] == [0x8000]
    with pytest.raises(PeerError, match="in two"):
        memory.unmap(0x8000, 0x800)
    with pytest.raises(PeerError, match="no such range"):
        memory.unmap(1 << 63, 1 << 63 | 1)


@pytest.mark.parametrize(
    ("address", "size", "offset", "number"),
    [
        (0, 0, 0, errno.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, 0, errno.EINVAL),
        (0x1234, PAGE, 0, errno.EINVAL),
        (0x1000, 123, 0, errno.EINVAL),
        (0x1000, PAGE, 7, errno.EINVAL),
        (0x100000, 64 * PAGE, 0, errno.EINVAL),  # beyond the end of the file: a SIGBUS later
        (0x1000, PAGE, 64 * PAGE, errno.EINVAL),
        (0x9000, 2 * PAGE, 0, errno.EEXIST),
        (0x9000, 3 * PAGE, 0, errno.EEXIST),
    ],
)
def test_maps_that_cannot_be(address: int, size: int, offset: int, number: int) -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0xA000, PAGE))
    before = count_fds()
    with pytest.raises(PeerError) as caught:
        memory.map(address, size, readable=True, writable=True, fd=memfd(4 * PAGE), offset=offset)
    assert caught.value.errno == number
    assert count_fds() == before
    assert len(memory.regions) == 1


def test_what_is_no_memory_is_refused() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(PeerError, match="no memory"):
        GuestMemory().map(0, PAGE, readable=True, writable=True, fd=read_end, offset=0)
    os.close(write_end)


def test_a_mapped_memfd_can_no_longer_shrink() -> None:
    memory = GuestMemory()
    fd = mapped(memory, 0x1000, PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_unmap_waits_for_whoever_uses_the_memory() -> None:
    memory = GuestMemory()
    fd = mapped(memory, 0x1000, PAGE, fill=b"data")
    view = memory.readable(0x1000, 4)[0]
    cancelled = []
    pin = memory.pin(lambda: [(0x1FF0, 4)], lambda: cancelled.append(True))
    elsewhere = memory.pin(lambda: [(0x9000, 4)], lambda: None)
    hold = memory.unmap(0x1000, PAGE)
    assert hold is not None
    # No new user, but the old one still has the client's bytes.
    with pytest.raises(Unmapped):
        memory.readable(0x1000, 1)
    assert bytes(view) == b"data"
    hold.expire()
    assert cancelled
    assert not hold.done
    memory.unpin(pin)
    assert hold.done
    assert bytes(view) == bytes(4)
    memory.unpin(elsewhere)
    os.close(fd)


def test_requests_in_flight_are_compared_with_an_unmap_in_steps() -> None:
    """256 requests of 1024 buffers each held up all devices for 0.1 s. What has ended meanwhile is not waited for."""
    memory = GuestMemory()
    steps: list[Callable[[], bool]] = []
    memory.configure("x", later=steps.append)
    fd = mapped(memory, 0x1000, PAGE)
    looked_up: list[int] = []
    cancelled: list[int] = []

    def pin(number: int, address: int) -> Pin:
        def ranges() -> Ranges:
            looked_up.append(number)
            return [(0x10_0000, 1)] * (AT_ONCE // 2) + [(address, 1)]

        return memory.pin(ranges, lambda: cancelled.append(number))

    elsewhere = [pin(number, 0x9000) for number in range(20)]
    there = [pin(20 + number, 0x1000) for number in range(20)]
    hold = memory.unmap(0x1000, PAGE)
    assert hold is not None
    assert len(looked_up) == 2
    [step] = steps
    assert step()
    assert len(looked_up) == 4
    hold.expire()
    for ended in [*elsewhere[10:], *there[10:]]:
        memory.unpin(ended)
    while step():
        pass
    assert len(looked_up) == len(set(looked_up)) <= 24
    assert set(range(20, 30)) <= set(cancelled)
    assert not set(cancelled) & set(range(20))
    for last in there[:9]:
        memory.unpin(last)
    assert not hold.done
    memory.unpin(there[9])
    assert hold.done
    for other in elsewhere[:10]:
        memory.unpin(other)
    os.close(fd)


def test_everything_is_let_go() -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:let-go" in line for line in maps)

    def map_one(address: int) -> None:
        memory.map(address, PAGE, readable=True, writable=True, fd=memfd(PAGE, name="let-go"), offset=0)

    memory = GuestMemory()
    before = count_fds()
    for number in range(10):
        map_one(0x10000 * number)
    map_one(1 << 45)
    assert mappings() == 11
    memory.clear()
    assert (mappings(), count_fds(), memory.regions) == (0, before, ())


class PretendClient:
    name = "a client"
    uid: int | None = None

    def __init__(self) -> None:
        self.bytes = bytearray(4 * PAGE)

    async def dma_read(self, address: int, count: int) -> bytes:
        return bytes(self.bytes[address : address + count])

    async def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.bytes[address : address + len(data)] = data


async def test_memory_without_a_file_is_reached_by_messages(caplog: pytest.LogCaptureFixture) -> None:
    memory, client = GuestMemory(), PretendClient()
    memory.attach(client)
    fd = mapped(memory, 2 * PAGE, PAGE)
    memory.map(0, 2 * PAGE, readable=True, writable=True, fd=None, offset=0)
    with pytest.raises(NeedsMessages):
        memory.readable(0x10, 4)
    await memory.write(2 * PAGE - 2, b"abcd")  # across both kinds
    assert client.bytes[2 * PAGE - 2 : 2 * PAGE] == b"ab"
    assert os.pread(fd, 2, 0) == b"cd"
    assert await memory.read(2 * PAGE - 2, 4) == b"abcd"
    with pytest.raises(Unmapped):
        await memory.read(3 * PAGE - 1, 2)
    memory.clear()
    os.close(fd)


async def test_missing_share_on_is_said_once_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    """VGA memory and mapped BARs of other devices come without an fd as well, and no device of ours reaches them."""
    memory = GuestMemory()
    memory.attach(PretendClient())
    for number in range(3):
        memory.map(number << 30, 1 << 30, readable=True, writable=True, fd=None, offset=0)
    memory.map(0xFD00_0000, 16 << 20, readable=True, writable=True, fd=None, offset=0)  # VGA
    memory.map(0xFFFC_0000, 0x4_0000, readable=True, writable=False, fd=None, offset=0)  # ROM
    assert caplog.records == []
    for _ in range(2):
        await memory.read(0x10, 4)
        await memory.write(0x10, b"data")
    assert [record.message.count("share=on") for record in caplog.records] == [1]
    memory.attach(PretendClient())  # another client: another QEMU's command line
    await memory.read(0x10, 4)
    assert [record.message.count("share=on") for record in caplog.records] == [1, 1]


def test_what_may_concern_others_is_announced() -> None:
    memory = GuestMemory()
    seen: list[str] = []
    memory.on_change = lambda: seen.append(str(memory.regions[-1]) if memory.regions else "nothing")
    os.close(mapped(memory, 0, PAGE))
    os.close(mapped(memory, PAGE, PAGE))
    assert not seen  # nobody has looked for it
    memory.unmap(PAGE, PAGE)
    assert len(seen) == 1
    os.close(mapped(memory, PAGE, PAGE))
    assert len(seen) == 1


async def look(memory: GuestMemory, how: str) -> None:
    match how:
        case "readable":
            memory.readable(0, 1)
        case "writable":
            memory.writable(0, 1)
        case "check":
            memory.check(0, 1, write=False)
        case "read":
            await memory.read(0, 1)
        case _:
            await memory.write(0, b"x")


@pytest.mark.parametrize("how", ["readable", "writable", "check", "read", "write"])
async def test_memory_that_was_missed_is_announced(how: str) -> None:
    memory = GuestMemory()
    seen: list[int] = []
    memory.on_change = lambda: seen.append(len(memory.regions))
    with pytest.raises(Unmapped):
        await look(memory, how)
    os.close(mapped(memory, PAGE, PAGE))
    assert seen == [1]  # it was not that, but whoever looks again misses it again
    with pytest.raises(Unmapped):
        memory.readable(0, 1)
    os.close(mapped(memory, 0, PAGE))
    assert seen == [1, 2]
    os.close(mapped(memory, 2 * PAGE, PAGE))
    assert seen == [1, 2]


def test_what_was_found_before_a_mapping_is_found_after_it() -> None:
    memory = GuestMemory()
    os.close(mapped(memory, 0, PAGE))
    before = memory.generation
    os.close(mapped(memory, PAGE, PAGE))
    assert memory.generation == before
    memory.unmap(PAGE, PAGE)
    assert memory.generation > before
