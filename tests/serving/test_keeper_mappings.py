"""Mappings that a keeper tells the next process of a device, many in one message."""

import errno
import os
from collections.abc import Iterator

import pytest

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import CLOSER, MOST_LEFT_OPEN
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, Command
from vfiouser_virtio.serving.keeper.mappings import MAPPINGS, MOST_MAPPINGS, dispatch_with_mappings, messages
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message

_MAP = codec(DMA_MAP)


@pytest.fixture
def function() -> Iterator[VirtioPci]:
    made = VirtioPci(Rng())
    yield made
    made.memory.clear()


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def mapping(page: int, *, size: int = 0x1000, flags: int = 3) -> bytes:
    return _MAP.pack(_MAP.size, flags, page << 12, page << 12, size)


def tell(function: VirtioPci, payload: bytes, fds: list[int]) -> int:
    """Do all of a message's work; in how many steps."""
    message = Message(0, MAPPINGS, 0, 0, memoryview(payload), fds)
    return 1 + sum(1 for _ in dispatch_with_mappings(function, message, Negotiated()).work)


def regions(function: VirtioPci) -> list[str]:
    return [str(region) for region in function.memory.regions]


def test_all_mappings_of_a_message_are_made_each_as_it_was(function: VirtioPci, file: int) -> None:
    """With its own rights and file; neighbours stay apart, for the client unmaps them one by one."""
    os.pwrite(file, b"two", 2 << 12)
    [told] = messages([(mapping(0), file), (mapping(1, flags=1), -1), (mapping(2), file), (mapping(3), file)])
    assert told.fds == [file]
    before = len(os.listdir("/proc/self/fd"))
    tell(function, told.payload, [os.dup(file)])
    assert len(os.listdir("/proc/self/fd")) == before
    assert regions(function) == [
        "0x0..0x1000 rw mapped",
        "0x1000..0x2000 r by message",
        "0x2000..0x3000 rw mapped",
        "0x3000..0x4000 rw mapped",
    ]
    assert bytes(function.memory.readable(0x2000, 3)[0]) == b"two"
    assert function.memory.unmap(0x2000, 0x1000) is None


def test_others_have_their_turns(function: VirtioPci) -> None:
    """A process that is told of tens of thousands answers its keeper in between."""
    [told] = messages((mapping(2 * page), -1) for page in range(MOST_MAPPINGS))
    assert tell(function, told.payload, []) > MOST_MAPPINGS // 100
    assert len(regions(function)) == MOST_MAPPINGS


def test_a_mapping_that_cannot_be_made_keeps_no_other_away(function: VirtioPci, file: int) -> None:
    [told] = messages([(mapping(0), file), (mapping(0), file), (mapping(1), file)])
    with pytest.raises(PeerError, match="overlaps") as caught:
        tell(function, told.payload, [os.dup(file)])
    assert caught.value.errno == errno.EEXIST
    assert len(regions(function)) == 2


def test_a_file_descriptor_that_did_not_arrive(function: VirtioPci, file: int) -> None:
    [told] = messages([(mapping(0), file), (mapping(1), -1)])
    with pytest.raises(PeerError, match="no room for its file descriptor") as caught:
        tell(function, told.payload, [])
    assert caught.value.errno == errno.EMFILE
    assert regions(function) == ["0x1000..0x2000 rw by message"]


def test_copies_of_a_file_that_cannot_be_closed_have_an_end(
    function: VirtioPci, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system hangs, and a client has mapped it again and again."""
    monkeypatch.setattr(CLOSER, "waiting", MOST_LEFT_OPEN)
    [told] = messages([(mapping(0), file), (mapping(1), -1)])
    with pytest.raises(PeerError, match="no room for its file descriptor"):
        tell(function, told.payload, [os.dup(file)])
    assert regions(function) == ["0x1000..0x2000 rw by message"]


def test_file_descriptors_are_closed_when_the_client_leaves_meanwhile(function: VirtioPci, file: int) -> None:
    [told] = messages((mapping(2 * page), file) for page in range(100))
    before = len(os.listdir("/proc/self/fd"))
    message = Message(0, MAPPINGS, 0, 0, memoryview(told.payload), [os.dup(file)])
    response = dispatch_with_mappings(function, message, Negotiated())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del response
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_other_commands_are_those_of_clients(function: VirtioPci) -> None:
    with pytest.raises(PeerError, match="unknown"):
        dispatch_with_mappings(function, Message(0, MAPPINGS + 1, 0, 0, b""), Negotiated())
    reset = Message(0, Command.DEVICE_RESET, 0, 0, b"")
    assert dispatch_with_mappings(function, reset, Negotiated()).payload == b""
