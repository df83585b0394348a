"""What docs/libvfio-user.md tells users of the bindings to keep in mind, shown on the real library.

What that means for the engine is in test_engine_limits.py.
"""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.vfu_peer import Peer, attached
from support.vfu_stage import PAGE, ask

from vfiouser_virtio.libvfio_user.bindings import Context, DevIrqType, DmaInfo, Library, RegionFlag, ResetType
from vfiouser_virtio.protocols.vfio_user import Command, IrqSetFlags, MessageFlags, PciIrq

EVENTFD = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


@pytest.fixture
def context(libvfio_user: Library, tmp_path: Path) -> Iterator[Context]:
    with Context(libvfio_user, tmp_path / "s") as context:
        yield context


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("client")
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_attach_waits_for_the_clients_version(context: Context) -> None:
    context.realize_ctx()
    assert context.attach_ctx() is False  # nobody is there: that does not wait
    peer = Peer(context.name)
    said: list[bool] = []

    def say() -> None:
        said.append(True)
        peer.version()

    timer = threading.Timer(0.2, say)
    timer.start()
    assert context.attach_ctx() is True
    assert said == [True]
    timer.join()
    peer.close()


def test_a_message_without_its_body_is_waited_for(context: Context) -> None:
    context.setup_region(0, PAGE, lambda offset, buffer, is_write: None, RegionFlag.RW)
    with attached(context) as peer:
        whole: list[bytes] = []
        left, right = socket.socketpair()
        with left, right:
            ours, peer.socket = peer.socket, left
            peer.region_read(0, 0, 4)
            peer.socket = ours
            whole.append(right.recv(4096))
        peer.socket.sendall(whole[0][:16])
        timer = threading.Timer(0.2, peer.socket.sendall, [whole[0][16:]])
        timer.start()
        assert context.run_ctx() == 1, "it has waited"
        timer.join()
        assert peer.receive().error == 0


def test_the_poll_fd_is_another_one_for_each_client(context: Context) -> None:
    listening = context.get_poll_fd()
    with attached(context):
        assert context.get_poll_fd() != listening
    with pytest.raises(OSError, match="vfu_run_ctx") as caught:
        context.run_ctx()
    assert caught.value.errno == errno.ENOTCONN
    assert context.get_poll_fd() == listening


def test_a_client_that_vanishes_amid_a_reply_is_told_by_the_reset_alone(context: Context) -> None:
    resets: list[ResetType] = []
    context.setup_device_reset_cb(resets.append)
    with attached(context) as peer:
        peer.send(Command.DEVICE_GET_INFO, (16).to_bytes(4, "little") + bytes(12))
    assert context.run_ctx() in (0, 1)
    assert resets == [ResetType.LOST_CONN]
    with pytest.raises(OSError, match="vfu_run_ctx") as caught:
        context.run_ctx()
    assert caught.value.errno == errno.ENOTCONN


def test_the_same_map_twice_is_registered_twice_and_unregistered_once(context: Context, memory: int) -> None:
    told: list[tuple[str, int]] = []

    def register(info: DmaInfo) -> None:
        told.append(("register", info.iova))

    def unregister(info: DmaInfo) -> None:
        told.append(("unregister", info.iova))

    context.setup_device_dma(register, unregister)
    with attached(context) as peer:
        for _ in range(2):
            assert ask(context, peer, peer.dma_map, 0x10000, PAGE, memory).error == 0
        assert ask(context, peer, peer.dma_unmap, 0x10000, PAGE).error == 0
        assert ask(context, peer, peer.dma_unmap, 0x10000, PAGE).error == errno.ENOENT
    assert told == [("register", 0x10000)] * 2 + [("unregister", 0x10000)]


def listened_to(context: Context, vectors: int) -> list[bool]:
    """Of each vector, whether the client gets it."""
    found = []
    for vector in range(vectors):
        try:
            context.irq_trigger(vector)
            found.append(True)
        except FileNotFoundError:  # ENOENT
            found.append(False)
    return found


def test_kinds_of_interrupt_share_their_eventfds(context: Context, eventfds: list[int]) -> None:
    context.setup_device_nr_irqs(DevIrqType.INTX, 1)
    context.setup_device_nr_irqs(DevIrqType.MSIX, 4)
    with attached(context) as peer:
        ask(context, peer, peer.set_irqs, PciIrq.MSIX, EVENTFD, 0, 4, b"", eventfds)
        assert listened_to(context, 4) == [True] * 4
        assert ask(context, peer, peer.set_irqs, PciIrq.INTX, DISABLE, 0, 0).error == 0
        assert listened_to(context, 4) == [False, True, True, True]


def test_a_range_of_vectors_is_disabled_up_to_the_wrong_one(context: Context, eventfds: list[int]) -> None:
    context.setup_device_nr_irqs(DevIrqType.MSIX, 4)
    with attached(context) as peer:
        ask(context, peer, peer.set_irqs, PciIrq.MSIX, EVENTFD, 0, 4, b"", eventfds)
        assert ask(context, peer, peer.set_irqs, PciIrq.MSIX, EVENTFD, 1, 3).error == 0
        assert listened_to(context, 4) == [True, False, False, True], "vectors 1 to 3 were to go"
        assert ask(context, peer, peer.set_irqs, PciIrq.MSIX, EVENTFD, 3, 1).error == 0
        assert listened_to(context, 4) == [True, False, False, True], "vector 3 was to go"


def test_a_read_by_message_takes_whatever_comes_for_the_answer(context: Context) -> None:
    context.setup_device_dma(None, None)
    context.setup_region(0, PAGE, lambda offset, buffer, is_write: None, RegionFlag.RW)
    with attached(context) as peer:
        assert ask(context, peer, peer.dma_map, 0x10000, PAGE).error == 0
        sgl = context.addr_to_sgl(0x10000, 4)
        peer.region_read(0, 0, 4)  # the client has asked already, when we do
        with pytest.raises(OSError, match="vfu_sgl_read"):
            context.sgl_read(sgl)


def test_with_a_twin_socket_it_does_not(context: Context) -> None:
    context.setup_device_dma(None, None)
    context.setup_region(0, PAGE, lambda offset, buffer, is_write: None, RegionFlag.RW)
    context.realize_ctx()
    peer = Peer(context.name)
    peer.version(twin_socket={"supported": True})
    assert context.attach_ctx()
    (fd,) = peer.receive(keep_fds=True).fds
    with socket.socket(fileno=fd) as twin:
        assert ask(context, peer, peer.dma_map, 0x10000, PAGE).error == 0
        peer.region_read(0, 0, 4)

        def answer() -> None:
            request = twin.recv(4096)
            header = bytearray(request[:16])
            header[4:8] = (16 + 16 + 4).to_bytes(4, "little")
            header[8] = MessageFlags.REPLY
            twin.sendall(bytes(header) + request[16:32] + b"data")

        thread = threading.Thread(target=answer)
        thread.start()
        assert context.sgl_read(context.addr_to_sgl(0x10000, 4)) == b"data"
        thread.join()
        assert context.run_ctx() == 1
        assert peer.receive().error == 0
    peer.close()


def test_a_quiesce_that_fails_drops_the_request_without_a_reply(context: Context) -> None:
    context.setup_device_quiesce_cb(lambda: False)
    with attached(context) as peer:
        peer.send(Command.DEVICE_RESET)
        with pytest.raises(OSError, match="vfu_run_ctx") as caught:
            context.run_ctx()
        assert caught.value.errno == errno.EBUSY
        context.device_quiesced(errno.EIO)
        assert context.run_ctx() == 0
        peer.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            peer.receive()
        # Now it has left, and its leaving is to be quiet, too.
        context.setup_device_quiesce_cb(lambda: True)


def test_descriptors_stay_the_callers(libvfio_user: Library, tmp_path: Path, memory: int, eventfds: list[int]) -> None:
    with Context(libvfio_user, tmp_path / "s") as context:
        context.setup_region(0, 4 * PAGE, None, RegionFlag.RW, fd=memory)
        context.create_ioeventfd(0, eventfds[0], 0, 4)
        context.realize_ctx()
    os.fstat(memory)
    os.fstat(eventfds[0])


def test_a_stale_socket_is_not_replaced(libvfio_user: Library, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    with pytest.raises(OSError, match="in use") as caught:
        Context(libvfio_user, tmp_path / "s")
    assert caught.value.errno == errno.EADDRINUSE
