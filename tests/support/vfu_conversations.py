"""What is said to libvfio-user for records: each function is one conversation, on a `Stage`; `CONVERSATIONS` is all."""

import errno
import os

from support.vfu_dma_conversations import dma, dma_messages, quiesce, resets
from support.vfu_stage import MEM, PAGE, Stage, ask, refused

from vfiouser_virtio.libvfio_user.bindings import (
    Context,
    DevIrqType,
    PciDevRegion,
    PciType,
    RegionFlag,
)
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    IRQ_INFO,
    REGION_INFO,
    REGION_IO_FDS,
    VERSION,
    Command,
    IrqSetFlags,
    MessageFlags,
)

READS = (
    (0, 0, 4), (0, 4, 1), (0, 8, 64), (0, 0x80, 4), (0, 0x84, 4), (0, 254, 4), (0, 0, 0), (1, 0, 4), (3, 0, 4),
    (4, 0, 4), (7, 16, 4), (8, 0, 1), (9, 0, 1),
)  # fmt: skip
"""Region, offset, bytes."""

WRITES = (
    (0, 0, b"abcd"), (0, 8, b"x" * 40), (0, 0x80, b"no"), (0, 0x84, b"more"), (0, 255, b"ab"), (1, 0, b"read-only"),
    (7, 4, b"config"), (4, 0, b"?"),
)  # fmt: skip
"""Region, offset, data."""

IO_FDS_REQUESTS = (
    (0, 16, 0, 0), (0, 4096, 0, 0), (1, 4096, 0, 0), (2, 4096, 0, 0), (9, 4096, 0, 0), (0, 8, 0, 0),
    (0, 4096, 1, 0), (0, 4096, 0, 1),
)  # fmt: skip
"""Region, argsz, flags, count."""


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
            DEVICE_INFO.build({"argsz": 16, "flags": 0, "num_regions": 0, "num_irqs": 0}),
        )
        ask(
            context,
            peer,
            peer.send,
            Command.DEVICE_GET_INFO,
            DEVICE_INFO.build({"argsz": 15, "flags": 0, "num_regions": 0, "num_irqs": 0}),
        )
        for index in range(10):
            for argsz in (32, 256):
                info = REGION_INFO.build(
                    {"argsz": argsz, "flags": 0, "index": index, "cap_offset": 0, "size": 0, "offset": 0}
                )
                ask(context, peer, peer.send, Command.DEVICE_GET_REGION_INFO, info)
        for region, offset, count in READS:
            ask(context, peer, peer.region_read, region, offset, count)
        for region, offset, data in WRITES:
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
        for index, argsz, flags, count in IO_FDS_REQUESTS:
            body = REGION_IO_FDS.build({"argsz": argsz, "flags": flags, "index": index, "count": count})
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
            info = IRQ_INFO.build({"argsz": 16, "flags": 0, "index": index, "count": 0})
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
