"""What is said to libvfio-user about memory, resets and quiescing, for records."""

import errno
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

from support.vfu_stage import MEM, PAGE, Stage, ask, refused

from vfiouser_virtio.libvfio_user.bindings import Context, ResetType, SglFlag
from vfiouser_virtio.protocols.vfio_user import DMA_UNMAP, Command, DmaMapFlags, DmaUnmapFlags

NO_LISTS = (
    (0x1FF0, 32, 3, 1), (0x1FF0, 0x1020, 1, 2), (0x7000, 4, 3, 1), (0x8FFF, 2, 3, 1), (0x3000, 4, 3, 1),
    (0x2FFF, 2, 3, 4), (0, 1 << 20, 1, 1),
)  # fmt: skip
"""Address, length, prot and room of lists that cannot be made."""

UNMAPS = (
    (0x0000, PAGE, 0), (0x0000, 2 * PAGE, 0), (0x0000, 2 * PAGE, 0), (0x5000, PAGE, 0),
    (0, PAGE, DmaUnmapFlags.ALL), (0x2000, PAGE, 4),
)  # fmt: skip
"""Address, size, flags."""


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
        for address, length, prot, room in NO_LISTS:
            refused(context.addr_to_sgl, address, length, prot, room)
        direct = SglFlag.DIRECT_ACCESS
        sgl = context.addr_to_sgl(0x100, 8)
        context.sgl_read(sgl, direct)
        context.sgl_write(sgl, b"directly", direct)
        context.sgl_read(sgl, direct)
        refused(context.sgl_write, context.addr_to_sgl(0x3000, 4, mmap.PROT_READ), b"none", direct)
        refused(context.sgl_read, context.addr_to_sgl(0x1FF0, 32), direct)
        refused(context.sgl_read, sgl, 2)
        for address, size, flags in UNMAPS:
            ask(context, peer, peer.dma_unmap, address, size, flags)
        ask(
            context,
            peer,
            peer.send,
            Command.DMA_UNMAP,
            DMA_UNMAP.build({"argsz": 8, "flags": 0, "address": 0, "size": 0}),
        )
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
    answers: Iterator[bool | OSError] = iter([True, False, OSError(errno.EIO, "broken"), False, True, False, False])

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
