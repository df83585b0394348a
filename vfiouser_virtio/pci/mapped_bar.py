"""BAR whose pages the client maps: its guest reads and writes them without a message.

::

    frames = BarMapping(0x10_0000, areas=[(0x1000, 0xF_F000)])
    function.add_bar(2, mapped_bar(frames, read=self.registers_read, write=self.registers_write))

    0x0000  registers: each access is a message, as in any BAR
    0x1000  memory of a memfd: frames.view here, RAM to the guest

What QEMU (11.1) makes of it: with such a BAR its writes to all BARs of the function wait for a reply. From the first
INTx on, accesses to mapped pages are messages until INTx is disabled, so use MSI-X or MSI. With the engine
libvfio-user nothing is mapped: all are messages.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vfiouser_virtio.pci.bars import Bar, BarKind
from vfiouser_virtio.vfio_device import AnswerLater, Buffer

if TYPE_CHECKING:
    from vfiouser_virtio.pci.bar_mapping import BarMapping


def mapped_bar(
    mapping: "BarMapping",
    *,
    read: Callable[[int, int], Buffer] | None = None,
    write: Callable[[int, Buffer], None] | None = None,
    kind: BarKind = BarKind.MEM64,
    prefetchable: bool = True,
) -> Bar:
    """The BAR of a mapping; ``read`` and ``write`` are those of `Bar`, for what is not in its areas.

    There, without ``read`` all is zero, and without ``write`` nothing is kept. A client that does not map, or an access
    that begins in one and ends in the other, reaches both by messages. Raises ValueError as `Bar`, and for I/O.
    """
    if kind is BarKind.IO:
        raise ValueError("an I/O BAR cannot be mapped")
    view = mapping.view

    def read_any(offset: int, count: int) -> Buffer:
        parts: list[Buffer] = []
        late: list[AnswerLater | Buffer] = []
        for start, end, mapped in mapping.pieces(offset, offset + count):
            if mapped:
                parts.append(bytes(view[start:end]))
                continue
            try:
                parts.append(bytes(end - start) if read is None else read(start, end - start))
            except AnswerLater as answer:
                late += [*parts, answer]
                parts = []
        if late:
            raise AnswerLater.joined([*late, *parts])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write_any(offset: int, data: Buffer) -> None:
        late: list[AnswerLater | Buffer] = []
        for start, end, mapped in mapping.pieces(offset, offset + len(data)):
            part = data[start - offset : end - offset]
            if mapped:
                view[start:end] = part
            elif write is not None:
                try:
                    write(start, part)
                except AnswerLater as taken:
                    late.append(taken)
        if late:
            raise AnswerLater.joined(late)

    return Bar(mapping.size, read_any, write_any, kind, prefetchable, mapping)
