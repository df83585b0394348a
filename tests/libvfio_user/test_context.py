"""`Context` over the double and over the real library: what it adds to C's errors, lifetimes and callbacks."""

import copy
import errno
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.vfu_peer import Peer
from support.vfu_stage import MEM, PAGE, ask

from vfiouser_virtio.libvfio_user.bindings import (
    Context,
    DevIrqType,
    DmaInfo,
    HasFunctions,
    LogLevel,
    PciType,
    RegionFlag,
    ResetType,
    SglFlag,
)
from vfiouser_virtio.protocols.vfio_user import Command


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def context(library: HasFunctions, tmp_path: Path) -> Iterator[Context]:
    with Context(library, tmp_path / "s") as context:
        context.pci_init(PciType.EXPRESS)
        yield context


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.truncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def attached(context: Context) -> Peer:
    """Realized, and with a client."""
    context.realize_ctx()
    peer = Peer(context.name)
    peer.version()
    assert context.attach_ctx()
    peer.receive()
    return peer


def test_all_is_given_back(library: HasFunctions, tmp_path: Path, memory: int) -> None:
    before = fds()
    event = os.eventfd(0)
    for _ in range(3):
        with Context(library, tmp_path / "s") as context:
            context.pci_init(PciType.EXPRESS)
            seen: list[object] = []
            context.setup_device_dma(seen.append, seen.append)
            context.setup_device_reset_cb(seen.append)
            context.setup_device_nr_irqs(DevIrqType.MSIX, 1)
            peer = attached(context)
            ask(context, peer, peer.dma_map, 0, PAGE, memory)
            ask(context, peer, peer.set_irqs, 2, 0x24, 0, 1, fds=[event])
            peer.close()
        assert [type(what) for what in seen] == [DmaInfo, DmaInfo, ResetType]
        assert seen[-1] == ResetType.LOST_CONN
        assert not (tmp_path / "s").exists()
    os.close(event)
    assert fds() == before


def test_a_context_that_is_destroyed_says_so(context: Context) -> None:
    context.destroy_ctx()
    context.destroy_ctx()
    for call in (context.run_ctx, context.get_poll_fd, context.get_private, context.realize_ctx):
        with pytest.raises(ValueError, match="has been destroyed"):
            call()


class Remembers:
    """Library that knows which contexts it has made."""

    def __init__(self, library: HasFunctions) -> None:
        self.handles: list[int | None] = []
        self.functions = copy.copy(library.functions)
        self.functions.vfu_create_ctx = self.create
        self._create = library.functions.vfu_create_ctx

    def create(self, *arguments: Any) -> int | None:
        self.handles.append(self._create(*arguments))
        return self.handles[-1]


def test_a_context_that_is_forgotten_is_noticed(library: HasFunctions, tmp_path: Path) -> None:
    remembers = Remembers(library)
    context = Context(remembers, tmp_path / "s")
    with pytest.warns(ResourceWarning, match="was not destroyed"):
        del context
    [handle] = remembers.handles
    assert handle is not None
    library.functions.vfu_destroy_ctx(handle)


def test_errors_name_the_function_and_the_device(library: HasFunctions, tmp_path: Path, context: Context) -> None:
    with pytest.raises(OSError, match=rf"\(vfu_create_ctx, {tmp_path}/s\)") as caught:
        Context(library, tmp_path / "s")
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(FileExistsError):
        context.pci_init(PciType.EXPRESS)


def test_what_c_would_not_survive(library: HasFunctions, tmp_path: Path) -> None:
    with Context(library, tmp_path / "s") as context:
        for call in (
            lambda: context.pci_set_id(1, 2, 3, 4),
            lambda: context.pci_set_class(1, 2, 3),
            lambda: context.pci_get_config_space(),
            lambda: context.pci_add_capability(0, 0, b""),
            lambda: context.pci_find_capability(1),
            lambda: context.pci_find_next_capability(0x40, 1),
            lambda: context.addr_to_sgl(0, 1),
            lambda: context.irq_trigger(0),
        ):
            with pytest.raises(OSError, match=r"no config space|no vfu_|not realized") as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        context.pci_init(PciType.CONVENTIONAL)
        assert len(context.pci_get_config_space()) == 256
        with pytest.raises(OSError, match="config space has 0x100 bytes, not 0x1000"):
            context.setup_region(7, 4096, lambda offset, buffer, is_write: None, 3 | 8)


@pytest.mark.parametrize("size", [None, 256, 4096])
def test_config_space_without_pci_init(library: HasFunctions, tmp_path: Path, size: int | None) -> None:
    """`realize_ctx` makes one, as in C: with the size of the region that was set up, else of 256 bytes."""
    with Context(library, tmp_path / "s") as context:
        if size is not None:
            context.setup_region(7, size, lambda offset, buffer, is_write: None, RegionFlag.RW)
        context.realize_ctx()
        assert len(context.pci_get_config_space()) == (size or 256)
        context.pci_set_id(0x1234, 0x5678, 0x9ABC, 0xDEF0)
        assert bytes(context.pci_get_config_space()[:4]) == b"\x34\x12\x78\x56"
        context.pci_get_config_space()[0x3C] = 5
        assert context.pci_get_config_space()[0x3C] == 5
        with pytest.raises(OSError, match=f"config space has {size or 256:#x} bytes, not 0x2000"):
            context.setup_region(7, 0x2000, lambda offset, buffer, is_write: None, RegionFlag.RW)
        with pytest.raises(FileExistsError):
            context.pci_init(PciType.EXPRESS)


@pytest.mark.parametrize("size", [1, 64, 255])
def test_a_config_space_that_has_no_room_for_its_header(library: HasFunctions, tmp_path: Path, size: int) -> None:
    """The library would write on behind it."""
    with Context(library, tmp_path / "s") as context:
        with pytest.raises(OSError, match=f"config space has at least 0x100 bytes, not {size:#x}"):
            context.setup_region(7, size, lambda offset, buffer, is_write: None, RegionFlag.RW)
        context.realize_ctx()
        assert len(context.pci_get_config_space()) == 256


def test_a_callback_that_raises(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    def access(offset: int, buffer: memoryview, is_write: bool) -> None:
        if offset == 0:
            raise OSError(errno.EBUSY, "not now")
        raise ZeroDivisionError("a bug")

    context.setup_region(0, PAGE, access, MEM)
    peer = attached(context)
    with caplog.at_level(logging.ERROR):
        assert ask(context, peer, peer.region_read, 0, 0, 4).error == errno.EBUSY
    assert caplog.records == []
    for _ in range(2):
        assert ask(context, peer, peer.region_read, 0, 4, 4).error == errno.EIO
    (record,) = caplog.records
    assert "the region 0 access callback raised" in record.message
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    peer.close()


def test_a_callback_that_cannot_say_so(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    def register(info: DmaInfo) -> None:
        raise OSError(errno.ENOMEM, "no room")

    context.setup_device_dma(register, None)
    peer = attached(context)
    assert ask(context, peer, peer.dma_map, 0, PAGE).error == 0
    assert "the dma_register callback raised" in caplog.text
    peer.close()


def test_control_c_goes_through(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    def access(offset: int, buffer: memoryview, is_write: bool) -> None:
        raise KeyboardInterrupt

    context.setup_region(0, PAGE, access, MEM)
    peer = attached(context)
    peer.region_read(0, 0, 4)
    with pytest.raises(KeyboardInterrupt):
        context.run_ctx()
    assert peer.receive().error == errno.EIO
    assert context.run_ctx() == 0
    caplog.clear()
    peer.close()


def test_a_buffer_may_be_kept(context: Context) -> None:
    kept: list[memoryview] = []

    def access(offset: int, buffer: memoryview, is_write: bool) -> None:
        kept.append(buffer[:2])
        if not is_write:
            buffer[:] = b"read"

    context.setup_region(0, PAGE, access, MEM)
    peer = attached(context)
    reply = ask(context, peer, peer.region_read, 0, 0, 4)
    assert reply.payload[16:] == b"read"
    ask(context, peer, peer.region_write, 0, 0, b"written")
    assert [bytes(part) for part in kept] == [b"re", b"wr"]
    kept[0][:] = b"!!"
    with pytest.raises(TypeError):
        kept[1][:] = b"!!"
    peer.close()


def _fill(byte: int, offset: int, buffer: memoryview, is_write: bool) -> None:
    buffer[0] = byte


def test_callbacks_live_as_long_as_the_context(context: Context) -> None:
    for byte in b"ab":
        context.setup_region(0, PAGE, partial(_fill, byte), MEM)
    gc.collect()
    peer = attached(context)
    assert ask(context, peer, peer.region_read, 0, 0, 1).payload[16:] == b"b"
    peer.close()


def test_no_way_into_the_library_from_within(context: Context) -> None:
    seen: list[str] = []

    def access(offset: int, buffer: memoryview, is_write: bool) -> None:
        for call in (context.run_ctx, context.attach_ctx, context.destroy_ctx, context.device_quiesced):
            with pytest.raises(RuntimeError, match="from within a callback"):
                call()
            seen.append(call.__name__)

    context.setup_region(0, PAGE, access, MEM)
    peer = attached(context)
    assert ask(context, peer, peer.region_read, 0, 0, 1).error == 0
    assert seen == ["run_ctx", "attach_ctx", "destroy_ctx", "device_quiesced"]
    peer.close()


def test_memory_is_seen_by_both(context: Context, memory: int) -> None:
    context.setup_device_dma(None, None)
    peer = attached(context)
    for address, offset in ((0x1000, 0), (0x2000, 2 * PAGE)):
        ask(context, peer, peer.dma_map, address, PAGE, memory, offset)
    sgl = context.addr_to_sgl(0x1FFC, 8)  # as many entries as it takes
    assert len(sgl) == 2
    first, second = context.sgl_get(sgl)
    first[:], second[:] = b"1234", b"5678"
    context.sgl_put(sgl)
    assert (os.pread(memory, 4, PAGE - 4), os.pread(memory, 4, 2 * PAGE)) == (b"1234", b"5678")
    one = context.addr_to_sgl(0x2000, 4)
    assert context.sg_is_mappable(one)
    with pytest.raises(ValueError, match="0x3 bytes for a scatter-gather list of 0x4"):
        context.sgl_write(one, b"abc", SglFlag.DIRECT_ACCESS)
    with pytest.raises(OSError, match="vfu_addr_to_sgl") as caught:
        context.addr_to_sgl(0x1FFC, 8, max_nr_sgs=1)
    assert caught.value.errno == errno.E2BIG
    peer.close()


def test_a_list_does_not_outlive_its_regions(context: Context, memory: int) -> None:
    context.setup_device_dma(None, None)
    peer = attached(context)
    ask(context, peer, peer.dma_map, 0, PAGE, memory)
    sgl = context.addr_to_sgl(0, 4)
    ask(context, peer, peer.dma_unmap, 0, PAGE)
    for call in (
        context.sgl_get,
        context.sgl_put,
        context.sgl_mark_dirty,
        context.sgl_read,
        context.sg_is_mappable,
        lambda sgl: context.sgl_write(sgl, b"late"),
    ):
        with pytest.raises(FileNotFoundError):
            call(sgl)
    peer.close()


def test_no_messages_while_a_quiesce_is_pending(context: Context) -> None:
    quiet = [True]
    context.setup_device_quiesce_cb(lambda: quiet[0])
    context.setup_device_dma(None, None)
    peer = attached(context)
    ask(context, peer, peer.dma_map, 0, PAGE)
    sgl = context.addr_to_sgl(0, 4)
    quiet[0] = False
    peer.send(Command.DEVICE_RESET)
    with pytest.raises(OSError, match="vfu_run_ctx") as caught:
        context.run_ctx()
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError, match="vfu_sgl_read") as caught:
        context.sgl_read(sgl)
    assert caught.value.errno == errno.EBUSY
    context.device_quiesced()
    assert peer.receive().error == 0
    quiet[0] = True
    peer.close()


def test_the_log(context: Context) -> None:
    lines: list[tuple[int, str]] = []
    context.setup_log(lambda level, text: lines.append((level, text)), LogLevel.WARNING)
    context.log(LogLevel.ERR, "100 % of it: ü")
    context.log(LogLevel.INFO, "not this")
    assert lines == [(3, "100 % of it: ü")]


def test_several_contexts_at_once(library: HasFunctions, tmp_path: Path) -> None:
    with Context(library, tmp_path / "a", private=1) as a, Context(library, tmp_path / "b", private=2) as b:
        peers = []
        for context in (a, b):
            context.pci_init(PciType.EXPRESS)

            def access(offset: int, buffer: memoryview, is_write: bool, context: Context = context) -> None:
                buffer[0] = context.get_private() or 0

            context.setup_region(0, PAGE, access, MEM)
            peers.append(attached(context))
        for _ in range(2):
            assert [ask(c, p, p.region_read, 0, 0, 1).payload[16] for c, p in zip((a, b), peers, strict=True)] == [1, 2]
        for peer in peers:
            peer.close()


def test_no_warning_of_a_context_that_could_not_be_made(library: HasFunctions, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="vfu_create_ctx"):
            Context(library, tmp_path / ("x" * 200))
        gc.collect()
