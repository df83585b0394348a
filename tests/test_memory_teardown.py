"""How a client's memory goes away: always, all of it, in small steps; and what holds when the kernel refuses."""

import ctypes
import errno
import gc
import mmap
import os
from collections.abc import Callable

import pytest
import trio
import trio.testing
from support import mapping_limit_child as child

from vfiouser_virtio import address_space
from vfiouser_virtio.address_space import PROCESS, WINDOW_SIZE, MappingBudget, Reserve
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.memory_removal import STEP
from vfiouser_virtio.pci import Identity, PciFunction
from vfiouser_virtio.transports.pci import VirtioPci

pytestmark = pytest.mark.once

PAGE = mmap.PAGESIZE


def memfd(pages: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE)
    return fd


def map_pages(memory: GuestMemory, fd: int, pages: range, *, base: int = 0) -> None:
    for page in pages:
        memory.map(base + page * PAGE, PAGE, readable=True, writable=True, fd=os.dup(fd), offset=page * PAGE)


class Client:
    name = "a client"
    uid: int | None = None

    async def dma_read(self, address: int, count: int) -> bytes:
        raise AssertionError

    async def dma_write(self, address: int, data: object) -> None:
        raise AssertionError


# ---- the limit of mappings ---------------------------------------------------------------------------------------


def test_at_the_limit_of_mappings_everything_is_still_unmapped() -> None:
    child.in_child(child.leaving_at_the_limit)


def test_two_clients_leave_a_third_its_share_and_nothing_behind() -> None:
    for line in child.in_child(child.three_devices).splitlines():
        first, second = map(int, line.split())
        assert first > 3 * second > 0  # who comes first has most, who comes second what is guaranteed


def test_leaving_needs_no_memory() -> None:
    child.in_child(child.without_memory)


def test_what_is_guaranteed_stays_free() -> None:
    budget = MappingBudget(800)
    shares = [budget.join() for _ in range(4)]  # 100 each, and 400 for whoever comes first
    assert shares[0].take(500)
    assert not shares[0].take(1)
    assert shares[0].limit == 500
    assert all(share.take(100) for share in shares[1:])
    assert not any(share.take(1) for share in shares)
    shares[0].give_back(10)
    assert shares[1].take(10)
    del shares[0]
    assert shares[0].take(400)


def test_nothing_is_kept_free_for_who_has_left() -> None:
    budget = MappingBudget(800)
    first, second, third = (budget.join() for _ in range(3))
    assert second.take(100)
    second.leave()  # its client is still there
    third.leave()
    third.leave()
    assert len(budget) == 2
    assert first.limit == 600
    second.give_back(100)
    assert first.limit == 800
    assert third.take(1)  # served again
    assert first.limit == 600


async def test_a_device_leaves_when_its_serving_ends() -> None:
    gc.collect()  # devices of other tests, as far as nobody has them
    before = len(PROCESS)
    function = VirtioPci(Rng())
    assert len(PROCESS) == before + 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        await trio.testing.wait_all_tasks_blocked()
        assert len(PROCESS) == before + 1
        nursery.cancel_scope.cancel()
    assert len(PROCESS) == before


def test_a_reserve_is_given_up_bit_by_bit() -> None:
    reserve = Reserve(3)
    reserve.fill()
    seen: list[int] = []

    def enough(count: int) -> bool:
        seen.append(1)
        return len(seen) == count

    assert reserve.spend(lambda: enough(3))
    assert not reserve.spend(lambda: enough(0))
    assert len(seen) == 3 + 2  # one was left
    reserve.fill()
    assert not reserve.spend(lambda: enough(0))
    assert len(seen) == 5 + 4


# ---- small steps -------------------------------------------------------------------------------------------------


def test_many_regions_go_in_small_steps() -> None:
    memory, fd = GuestMemory(), memfd(4 * STEP)
    steps: list[Callable[[], bool]] = []
    memory.configure("blk0", later=steps.append)
    map_pages(memory, fd, range(4 * STEP))
    view = memory.writable(0, 4 * STEP * PAGE)[0]
    hold = memory.unmap(0, 1 << 64)
    assert hold is not None
    with pytest.raises(Unmapped):
        memory.readable(0, 1)
    with pytest.raises(PeerError) as caught:
        map_pages(memory, fd, range(1))
    assert caught.value.errno == errno.EBUSY
    [step] = steps
    assert [step() for _ in range(4)] == [True, True, True, False]
    assert hold.done
    view[:4] = view[-4:] = b"lost"
    assert os.pread(fd, 4, 0) == os.pread(fd, 4, (4 * STEP - 1) * PAGE) == bytes(4)
    map_pages(memory, fd, range(1))
    os.close(fd)


def test_a_client_that_leaves_while_its_memory_is_in_use() -> None:
    """Requests that use what was unmapped before, or is mapped still, go on to their end."""
    memory, fd = GuestMemory(), memfd(2)
    map_pages(memory, fd, range(2))
    view = memory.writable(0, 2 * PAGE)[0]

    def ranges_of(page: int) -> Callable[[], list[tuple[int, int]]]:
        return lambda: [(page * PAGE, 4)]

    pins = [memory.pin(ranges_of(page), lambda: None) for page in range(2)]
    unmapped = memory.unmap(0, PAGE)
    left = memory.clear()
    assert unmapped is not None
    assert left is not None
    with pytest.raises(PeerError):
        memory.attach(Client())
    memory.unpin(pins[1])
    assert (unmapped.done, left.done) == (False, False)
    view[:4] = b"used"
    assert os.pread(fd, 4, 0) == b"used"
    memory.unpin(pins[0])
    assert (unmapped.done, left.done) == (True, True)
    view[:4] = b"lost"
    assert os.pread(fd, 4, 0) == b"used"
    memory.attach(Client())
    os.close(fd)


# ---- the kernel refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Lets mmap(2) over what is mapped already fail, where a function of the size says so."""
    original = address_space.map_zeros

    def install(refused: Callable[[int], bool]) -> None:
        def map_zeros(address: int, size: int) -> bool:
            if refused(size):
                ctypes.set_errno(errno.ENOMEM)
                return False
            return original(address, size)

        monkeypatch.setattr(address_space, "map_zeros", map_zeros)

    return install


Refuse = Callable[[Callable[[int], bool]], None]


def test_where_a_part_cannot_be_unmapped_all_of_it_goes(refuse: Refuse, caplog: pytest.LogCaptureFixture) -> None:
    memory, fd, cancelled = GuestMemory(), memfd(4), list[bool]()
    memory.attach(Client())
    map_pages(memory, fd, range(4))
    view = memory.writable(0, 4 * PAGE)[0]
    memory.pin(lambda: [(3 * PAGE, 1)], lambda: cancelled.append(True))
    refuse(lambda size: size == PAGE)
    with pytest.raises(PeerError, match=r"DMA_UNMAP of 0x1000\.\.") as caught:
        memory.unmap(PAGE, PAGE)
    assert caught.value.fatal
    assert (memory.regions, cancelled) == ((), [True])
    view[::PAGE] = b"lost"
    assert os.pread(fd, 4 * PAGE, 0) == bytes(4 * PAGE)
    with pytest.raises(PeerError, match="takes no client"):
        map_pages(memory, fd, range(1))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    memory.clear()
    memory.attach(Client())  # nothing was left behind
    os.close(fd)


def test_a_device_that_cannot_let_go_takes_no_other_client(refuse: Refuse, caplog: pytest.LogCaptureFixture) -> None:
    function = PciFunction(Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000))
    function.memory.configure("blk0")
    fd = memfd(4)
    function.connected(Client())
    map_pages(function.memory, fd, range(4))
    refuse(lambda size: size in (4 * PAGE, WINDOW_SIZE))
    function.disconnected()
    what = "blk0: memory of its client cannot be unmapped (Cannot allocate memory); it takes no client any more"
    assert caplog.messages == [what]
    refuse(lambda size: False)
    for _ in range(2):
        with pytest.raises(PeerError, match="takes no client any more; start its process again") as caught:
            function.connected(Client())
        assert caught.value.fatal
        function.disconnected()
    assert len(caplog.messages) == 1
    os.close(fd)


def test_a_callback_that_fails_keeps_no_memory() -> None:
    function = PciFunction(Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000))
    fd = memfd(1)
    function.connected(Client())
    map_pages(function.memory, fd, range(1))
    view = function.memory.writable(0, 4)[0]

    def fails() -> None:
        raise RuntimeError("a bug of an author")

    function.on_disconnected = fails
    with pytest.raises(RuntimeError):
        function.disconnected()
    view[:] = b"lost"
    assert os.pread(fd, 4, 0) == bytes(4)
    assert function.memory.regions == ()
    os.close(fd)
