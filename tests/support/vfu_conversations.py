"""What is said to libvfio-user, in all its parts, for records: each function is one conversation, on a `Stage`."""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.vfu_peer import Peer
from support.vfu_recorder import RecordedFunctions

from vfiouser_virtio.libvfio_user.bindings import (
    Context,
    DevIrqType,
    Functions,
    PciDevRegion,
    PciType,
    RegionFlag,
    ResetType,
    SglFlag,
)
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    DMA_UNMAP,
    IRQ_INFO,
    REGION_INFO,
    REGION_IO_FDS,
    VERSION,
    Command,
    DmaMapFlags,
    DmaUnmapFlags,
    IrqSetFlags,
    MessageFlags,
)

MEM = RegionFlag.RW | RegionFlag.MEM
PAGE = 4096


class Stage:
    """Where a conversation takes place: the recorded library, a folder, and what has been opened there."""

    def __init__(self, functions: Functions, folder: Path) -> None:
        self.functions = RecordedFunctions(functions)
        self.path = folder / "s"
        self._fds: list[int] = []
        self._peers: list[Peer] = []

    @contextmanager
    def device(self, set_up: Callable[[Context], None] = lambda context: None) -> Iterator[Context]:
        """A realized PCI Express device."""
        with Context(self, self.path) as context:
            context.pci_init(PciType.EXPRESS)
            set_up(context)
            context.realize_ctx()
            yield context

    @contextmanager
    def driven(self, set_up: Callable[[Context], None]) -> Iterator[tuple[Context, Peer]]:
        """A device and a client that it has agreed on a version with."""
        with self.device(set_up) as context:
            peer = self.peer()
            peer.version()
            context.attach_ctx()
            peer.receive()
            yield context, peer
            peer.close()

    def peer(self) -> Peer:
        self._peers.append(peer := Peer(self.path, self.functions.client))
        return peer

    def memory(self, size: int, content: bytes = b"") -> int:
        """A memfd."""
        self._fds.append(fd := os.memfd_create("conversation"))
        os.truncate(fd, size)
        os.pwrite(fd, content, 0)
        return fd

    def eventfd(self) -> int:
        self._fds.append(fd := os.eventfd(0, os.EFD_NONBLOCK))
        return fd

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for peer in self._peers:
            peer.close()


def ask(context: Context, peer: Peer, request: Callable[..., None], *arguments: Any, **options: Any) -> Any:
    """One request, handled, and its reply."""
    request(*arguments, **options)
    context.run_ctx()
    return peer.receive()


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """A call that fails; with which errno is in the record."""
    try:
        call(*arguments, **options)
    except OSError:
        return
    raise AssertionError("the call succeeded")


def life_cycle(stage: Stage) -> None:
    """Nobody there, a client, nothing to do, gone, the next one."""
    with Context(stage, stage.path, private=0x1234) as context:
        context.get_private()
        context.pci_init(PciType.EXPRESS)
        refused(context.pci_init, PciType.EXPRESS)
        refused(context.run_ctx)
        context.setup_device_reset_cb(lambda kind: None)
        context.realize_ctx()
        context.realize_ctx()
        refused(context.run_ctx)
        for _ in range(2):
            context.attach_ctx()
            context.get_poll_fd()
            peer = stage.peer()
            peer.version()
            context.attach_ctx()
            refused(context.attach_ctx)
            peer.receive()
            context.run_ctx()
            peer.close()
            refused(context.run_ctx)
            refused(context.run_ctx)


def versions(stage: Stage) -> None:
    """A version that is refused, none at all, and a client that is gone before it has sent one."""
    with stage.device() as context:
        peer = stage.peer()
        peer.version(major=1)
        refused(context.attach_ctx)
        peer.receive()
        peer = stage.peer()
        peer.send(Command.DEVICE_RESET, bytes(16))
        refused(context.attach_ctx)
        peer.receive()
        peer = stage.peer()
        peer.send(Command.VERSION, VERSION.build({"major": 0, "minor": 9, "data": b""}))
        context.attach_ctx()
        peer.receive()
        peer.close()
        refused(context.run_ctx)
        stage.peer().close()
        refused(context.attach_ctx)
        peer = stage.peer()
        peer.version(minor=0, max_data_xfer_size=4096, twin_socket={"supported": True})
        context.attach_ctx()
        peer.receive()


def paths(stage: Stage) -> None:
    """A path that is taken, and one that is too long."""
    with stage.device():
        refused(Context, stage, stage.path)
    refused(Context, stage, stage.path.parent / ("x" * 200))


def regions(stage: Stage) -> None:
    """All sorts of regions; accesses that end well, badly, or too soon."""
    stored = bytearray(range(256))

    def access(offset: int, buffer: memoryview, is_write: bool) -> int | None:
        match offset:
            case 0x80:
                raise OSError(errno.EPERM, "no")
            case 0x84:
                return 1
        if is_write:
            stored[offset : offset + len(buffer)] = buffer
        else:
            buffer[:] = stored[offset : offset + len(buffer)]
        return None

    def set_up(context: Context) -> None:
        context.setup_region(0, 256, access, MEM)
        context.setup_region(1, 64, access, RegionFlag.READ)
        context.setup_region(2, 4 * PAGE, access, MEM | RegionFlag.BITS_64, [(PAGE, PAGE), (3 * PAGE, PAGE)], memory)
        context.setup_region(4, PAGE, None, MEM | RegionFlag.BITS_64 | RegionFlag.PREFETCH, (), memory, PAGE)
        context.setup_region(PciDevRegion.CONFIG, PAGE, access, RegionFlag.RW | RegionFlag.ALWAYS_CB)
        for bad in (
            (0, 100, access, MEM),
            (0, 256, access, RegionFlag.MEM),
            (0, 256, access, 1 << 10),
            (0, 256, None, MEM | RegionFlag.ALWAYS_CB),
            (0, 8, access, MEM),
            (3, 256, access, MEM),
            (1, 256, access, MEM | RegionFlag.BITS_64),
            (9, 256, access, MEM),
            (-1, 256, access, MEM),
            (0, 256, access, MEM, [(0, 128)]),
            (0, 256, access, MEM, [(128, 256)], memory),
            (PciDevRegion.CONFIG, PAGE, access, RegionFlag.READ),
        ):
            refused(context.setup_region, *bad)

    memory = stage.memory(8 * PAGE)
    with stage.driven(set_up) as (context, peer):
        ask(
            context,
            peer,
            peer.send,
            Command.DEVICE_GET_INFO,
            DEVICE_INFO.build(dict(argsz=16, flags=0, num_regions=0, num_irqs=0)),
        )
        ask(
            context,
            peer,
            peer.send,
            Command.DEVICE_GET_INFO,
            DEVICE_INFO.build(dict(argsz=15, flags=0, num_regions=0, num_irqs=0)),
        )
        for index in range(10):
            for argsz in (32, 256):
                info = REGION_INFO.build(dict(argsz=argsz, flags=0, index=index, cap_offset=0, size=0, offset=0))
                ask(context, peer, peer.send, Command.DEVICE_GET_REGION_INFO, info)
        for region, offset, count in ((0, 0, 4), (0, 4, 1), (0, 8, 64), (0, 0x80, 4), (0, 0x84, 4), (0, 254, 4),
                                      (0, 0, 0), (1, 0, 4), (3, 0, 4), (4, 0, 4), (7, 16, 4), (8, 0, 1), (9, 0, 1)):  # fmt: skip
            ask(context, peer, peer.region_read, region, offset, count)
        for region, offset, data in ((0, 0, b"abcd"), (0, 8, b"x" * 40), (0, 0x80, b"no"), (0, 0x84, b"more"),
                                     (0, 255, b"ab"), (1, 0, b"read-only"), (7, 4, b"config"), (4, 0, b"?")):  # fmt: skip
            ask(context, peer, peer.region_write, region, offset, data)
        peer.region_write(0, 0, b"no reply", flags=MessageFlags.NO_REPLY)
        context.run_ctx()
        peer.region_write(0, 0x80, b"no error reply either", flags=MessageFlags.NO_REPLY)
        context.run_ctx()
        ask(context, peer, peer.region_read, 0, 0, 8)
        ask(context, peer, peer.send, Command.REGION_READ, b"short")
        ask(context, peer, peer.send, Command.REGION_WRITE_MULTI, bytes(32))
        ask(context, peer, peer.send, 99, bytes(8))
        ask(context, peer, peer.send, Command.DEVICE_GET_INFO)


def ioeventfds(stage: Stage) -> None:
    """What GET_REGION_IO_FDS tells of them."""

    def set_up(context: Context) -> None:
        context.setup_region(0, PAGE, None, MEM)
        context.setup_region(1, PAGE, None, MEM)
        fds = [stage.eventfd(), stage.eventfd()]
        context.create_ioeventfd(0, fds[0], 0, 2)
        context.create_ioeventfd(0, fds[1], 4, 4, 1, 0x55)
        context.create_ioeventfd(0, fds[0], 8, 2)
        refused(context.create_ioeventfd, 0, fds[0], PAGE - 1, 2)
        refused(context.create_ioeventfd, 9, fds[0], 0, 2)

    with stage.driven(set_up) as (context, peer):
        for index, argsz, flags, count in ((0, 16, 0, 0), (0, 4096, 0, 0), (1, 4096, 0, 0), (2, 4096, 0, 0), (9, 4096, 0, 0),
                                           (0, 8, 0, 0), (0, 4096, 1, 0), (0, 4096, 0, 1)):  # fmt: skip
            body = REGION_IO_FDS.build(dict(argsz=argsz, flags=flags, index=index, count=count))
            ask(context, peer, peer.send, Command.DEVICE_GET_REGION_IO_FDS, body)


def irqs(stage: Stage) -> None:
    """Eventfds come, are signalled by either side, and go; masks; what is not allowed."""
    none, bool_, event = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
    trigger, mask, unmask = IrqSetFlags.ACTION_TRIGGER, IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK

    def set_up(context: Context) -> None:
        context.setup_device_nr_irqs(DevIrqType.INTX, 1)
        context.setup_device_nr_irqs(DevIrqType.MSIX, 4)
        context.setup_irq_state_callback(DevIrqType.INTX, lambda start, count, mask: None)
        refused(context.setup_device_nr_irqs, 5, 1)
        refused(context.setup_irq_state_callback, 5, lambda start, count, mask: None)

    events = [stage.eventfd() for _ in range(4)]
    with stage.driven(set_up) as (context, peer):
        for index in range(6):
            info = IRQ_INFO.build(dict(argsz=16, flags=0, index=index, count=0))
            ask(context, peer, peer.send, Command.DEVICE_GET_IRQ_INFO, info)
        refused(context.irq_trigger, 0)
        refused(context.irq_trigger, 4)
        ask(context, peer, peer.set_irqs, 2, event | trigger, 0, 4, fds=events)
        for vector in range(4):
            context.irq_trigger(vector)
            assert os.eventfd_read(events[vector]) == 1
        for index, flags, start, count, data, fds in (
            (2, none | trigger, 1, 2, b"", []),
            (2, bool_ | trigger, 0, 4, b"\1\0\0\1", []),
            (2, bool_ | trigger, 0, 4, b"\1", []),
            (2, event | trigger, 3, 2, b"", events[:2]),
            (2, event | trigger, 0, 2, b"", events[:1]),
            (2, none | trigger, 0, 4, b"", events),
            (2, none | mask, 0, 4, b"", []),
            (0, none | mask, 0, 1, b"", []),
            (0, none | unmask, 0, 1, b"", []),
            (0, none | unmask, 0, 0, b"", []),
            (0, none | unmask | mask, 0, 1, b"", []),
            (0, none | event | trigger, 0, 1, b"", []),
            (3, none | mask, 0, 1, b"", []),
            (3, event | trigger, 0, 1, b"", events[:1]),
            (4, none | trigger, 0, 1, b"", []),
            (1, none | trigger, 0, 0, b"", []),
            (5, none | trigger, 0, 1, b"", []),
            (2, event | trigger, 0, 1, b"", []),
        ):
            ask(context, peer, peer.set_irqs, index, flags, start, count, data, fds)
            for fd in events:
                with_event(fd)
        refused(context.irq_trigger, 0)
        context.irq_trigger(1)
        ask(context, peer, peer.set_irqs, 2, none | trigger, 0, 0)
        refused(context.irq_trigger, 1)
        ask(context, peer, peer.set_irqs, 0, event | trigger, 0, 1, fds=events[:1])
        context.irq_trigger(0)


def with_event(fd: int) -> bool:
    """Whether an eventfd was signalled; it is not any more."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def dma(stage: Stage) -> None:
    """Regions with and without a descriptor; lists over them; direct accesses; unmap, all at once, left behind."""

    def set_up(context: Context) -> None:
        refused(context.addr_to_sgl, 0, 1)
        context.setup_device_dma(lambda info: None, lambda info: None, 5)
        context.setup_device_reset_cb(lambda kind: None)

    memory = stage.memory(8 * PAGE, bytes(range(256)) * 32)
    with stage.driven(set_up) as (context, peer):
        for address, size, fd, offset, flags in (
            (0x0000, 2 * PAGE, memory, PAGE, 3),
            (0x2000, PAGE, memory, 4 * PAGE, 3),
            (0x3000, PAGE, memory, 5 * PAGE, 1),
            (0x8000, PAGE, None, 0, 3),
            (0x8000, PAGE, None, 0, 3),
            (0x1000, PAGE, memory, 0, 3),
            (0x0000, 2 * PAGE, memory, 0, 3),
            (0x9000, PAGE, None, 0, 0x10),
            (0xA000, PAGE, None, 0, 1),
            (0xC000, PAGE, None, 0, 3),
        ):
            ask(context, peer, peer.dma_map, address, size, fd, offset, DmaMapFlags(flags))
        for address, length in ((0, 16), (0x1FF0, 32), (0x2010, 1), (0x8010, 4)):
            sgl = context.addr_to_sgl(address, length, max_nr_sgs=2)
            context.sg_is_mappable(sgl)
            if address == 0x8010:
                refused(context.sgl_get, sgl)
                continue
            for view in context.sgl_get(sgl):
                view[:1] = b"!"
            context.sgl_mark_dirty(sgl)
            context.sgl_put(sgl)
        for address, length, prot, room in ((0x1FF0, 32, 3, 1), (0x1FF0, 0x1020, 1, 2), (0x7000, 4, 3, 1), (0x8FFF, 2, 3, 1),
                                            (0x3000, 4, 3, 1), (0x2FFF, 2, 3, 4), (0, 1 << 20, 1, 1)):  # fmt: skip
            refused(context.addr_to_sgl, address, length, prot, room)
        direct = SglFlag.DIRECT_ACCESS
        sgl = context.addr_to_sgl(0x100, 8)
        context.sgl_read(sgl, direct)
        context.sgl_write(sgl, b"directly", direct)
        context.sgl_read(sgl, direct)
        refused(context.sgl_write, context.addr_to_sgl(0x3000, 4, mmap.PROT_READ), b"none", direct)
        refused(context.sgl_read, context.addr_to_sgl(0x1FF0, 32), direct)
        refused(context.sgl_read, sgl, 2)
        for address, size, flags in ((0x0000, PAGE, 0), (0x0000, 2 * PAGE, 0), (0x0000, 2 * PAGE, 0), (0x5000, PAGE, 0),
                                     (0, PAGE, DmaUnmapFlags.ALL), (0x2000, PAGE, 4)):  # fmt: skip
            ask(context, peer, peer.dma_unmap, address, size, flags)
        ask(context, peer, peer.send, Command.DMA_UNMAP, DMA_UNMAP.build(dict(argsz=8, flags=0, address=0, size=0)))
        refused(context.addr_to_sgl, 0, 16)
        ask(context, peer, peer.dma_unmap, 0, 0, DmaUnmapFlags.ALL)
        ask(context, peer, peer.dma_map, 0x1000, PAGE, memory)
        ask(context, peer, peer.dma_map, 0x5000, PAGE)
        peer.close()
        refused(context.run_ctx)


def dma_messages(stage: Stage) -> None:
    """Memory without a descriptor is read and written by messages, which the client answers."""

    def set_up(context: Context) -> None:
        context.setup_device_dma(None, None)

    memory = bytearray(range(256))
    with stage.driven(set_up) as (context, peer):
        ask(context, peer, peer.dma_map, 0, PAGE)

        def answered(call: Callable[..., Any], *arguments: Any) -> Any:
            # What the client hears and says is recorded by its own thread, while the library waits: in order.
            client = threading.Thread(target=peer.answer_dma, args=(memory,))
            client.start()
            try:
                return call(*arguments)
            finally:
                client.join()

        sgl = context.addr_to_sgl(0x10, 16)
        assert answered(context.sgl_read, sgl) == bytes(range(0x10, 0x20))
        answered(context.sgl_write, sgl, b"sixteen bytes...")
        assert memory[0x10:0x20] == b"sixteen bytes..."


def resets(stage: Stage) -> None:
    """DEVICE_RESET, done and refused."""
    outcomes = iter([None, OSError(errno.EBUSY, "not now"), ValueError("a bug"), None])

    def reset(kind: ResetType) -> None:
        if error := next(outcomes):
            raise error

    def set_up(context: Context) -> None:
        context.setup_device_reset_cb(reset)

    with stage.driven(set_up) as (context, peer):
        for _ in range(3):
            ask(context, peer, peer.send, Command.DEVICE_RESET)


def quiesce(stage: Stage) -> None:
    """A device that is quiet at once, later, never; a client that leaves meanwhile."""
    answers = iter([True, False, OSError(errno.EIO, "broken"), False, True, False, False])

    def quiesced() -> bool:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def set_up(context: Context) -> None:
        context.setup_device_dma(lambda info: None, lambda info: None)
        context.setup_device_reset_cb(lambda kind: None)
        context.setup_region(0, PAGE, lambda offset, buffer, is_write: None, MEM)
        context.setup_device_quiesce_cb(quiesced)

    with stage.driven(set_up) as (context, peer):
        refused(context.device_quiesced)
        ask(context, peer, peer.dma_map, 0, PAGE)
        peer.dma_map(0x1000, PAGE)
        refused(context.run_ctx)
        peer.region_read(0, 0, 4)
        refused(context.run_ctx)
        context.device_quiesced()
        peer.receive()
        context.run_ctx()
        peer.receive()
        ask(context, peer, peer.dma_unmap, 0, PAGE)
        peer.send(Command.DEVICE_RESET)
        refused(context.run_ctx)
        context.device_quiesced()
        peer.receive()
        ask(context, peer, peer.send, Command.DEVICE_RESET)
        peer.dma_unmap(0x1000, PAGE)
        refused(context.run_ctx)
        peer.close()
        refused(context.run_ctx)
        try:
            context.device_quiesced()
        except OSError:
            pass
        try:
            context.run_ctx()
        except OSError:
            pass
        try:
            context.device_quiesced()
        except OSError:
            pass
        context.attach_ctx()
        refused(context.run_ctx)


def identity(stage: Stage) -> None:
    """Ids, class, and the library's log."""
    with stage.device(lambda context: context.pci_set_id(0x1AF4, 0x1042, 0x1AF4, 0x1100)) as context:
        context.pci_set_class(1, 2, 3)
        context.setup_log(lambda level, text: None, 4)
        context.log(3, "%d is no format")
        context.log(5, "too detailed")
        refused(context.setup_log, lambda level, text: None, 9)
        assert bytes(context.pci_get_config_space()[:16]) == bytes.fromhex("f41a4210000000000003020100000000")


CONVERSATIONS = (
    life_cycle, versions, paths, regions, ioeventfds, irqs, dma, dma_messages, resets, quiesce, identity,
)  # fmt: skip
