"""Quick ways for bursts of frames from a netdev straight into the driver's receive buffers.

Complete frames that lie in memory, as a stream socket brings them, are copied in one piece with their header. Frames of
a file, such as a TAP interface, are read to where the driver wants them.

::

    readv ──▶ │ header, frame │ in the driver's buffer ──▶ as the one before, or as the driver wants it? ──▶ used ring
                                                                  └─ no: the buffer is for the next frame

This saves an object for each frame, a copy, and most of what `Receiver` does for it. What a buffer has no room for, as
of TCP segments of 64 KiB, is read behind it, and copied to the buffers that follow. What is not of the usual kind goes
the way of `Receiver`: frames that need an offload that the driver has not, or more buffers than there are, and all of
them with RSS or hashes.

A frame is in the driver's buffer before its filter is asked. One that is refused stays there until the next is read
over it, in a buffer that the driver is not given back: it could look, and sees what promiscuous mode would have shown
it. The filter is the driver's own, to be spared work (5.1.9.5.1), and keeps no guest from its network's frames.
"""

import os
import struct
from collections.abc import Sequence
from itertools import islice

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import Read
from vfiouser_virtio.backends.net.offload import needs
from vfiouser_virtio.devices.net_delivery import FLAGS, MAX_SPREAD, fill
from vfiouser_virtio.devices.net_receive import Receiver
from vfiouser_virtio.devices.net_receive_queue import ReceiveQueue
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC
from vfiouser_virtio.virtio import GuestError, Singles

_SIZE = HDR_CODEC.size
# Bytes of frames that are not looked at here: they need more than one buffer.
_LONG = 4096
_HEAD = struct.Struct("16s")
# Of a buffer: flags and gso_type; then what `ReceiveFilter` looks at.
_LOOK = struct.Struct(f"<H{_SIZE - 2}x16s")
_LEAST = _LOOK.size
# num_buffers, which is 1 without MRG_RXBUF as well (5.1.9.4.1), and which the kernel leaves as it is.
_COUNT_LOW, _COUNT_HIGH = _SIZE - 2, _SIZE - 1
# Frames that the driver does not want, beside the others of a burst.
_UNWANTED = 64
# Buffers that are taken together for a long frame, and bytes of such frames in a burst, but for the last.
_MORE, _MOST = 64, 128 << 10
_FIELDS = struct.Struct("<BBHHHH")


class ReadingReceiver(Receiver):
    """`Receiver` that takes bursts without `Frame` objects, from netdevs that look for these methods."""

    def read_burst(self, fd: int, header_size: int, limit: int, scratch: memoryview) -> Read | None:
        """See `burst_reader`."""
        if (
            not self._open
            or self._rest is not None
            or not self.steering.trivial
            or not header_size == self._size == _SIZE
        ):
            return None
        receiveq = self.queues[0]
        queue = receiveq.queue
        try:
            singles = queue.take_singles(limit, writable=True)
        except GuestError as error:
            self._fail(error)
            return None
        if singles is None:
            if not queue.enabled or queue.abandoned:
                return None
            self._lacking = queue, 1
            return Read(0, 0, None, None, room=False)
        view, most, wanted = singles.view, self._limit + _SIZE, self.filter
        read, look, tries = os.readv, _LOOK.unpack_from, iter(range(limit + _UNWANTED))
        written: list[int] = []
        usual: tuple[int, bytes] | None = None
        word = counted = unwanted = unwanted_octets = behind = spread = long_octets = 0
        end: OSError | None = None
        left: Frame | None = None
        try:
            for _, start, room in (buffers := iter(singles.buffers)):
                for _ in tries:
                    got = read(fd, (view[start : start + room], scratch))
                    if got > room or not _LEAST <= got <= most:
                        behind = self._buffers_behind(singles, len(written), got, most)
                        if not behind:
                            left = self._left(view[start : start + min(got, room)], scratch[: max(got - room, 0)])
                            break
                    seen = look(view, start)
                    if seen == usual:
                        break
                    if not wanted.everything and not wanted.accepts(
                        Frame((view[start + _SIZE : start + min(got, room)],), got - _SIZE)
                    ):
                        behind = 0
                        unwanted += 1
                        unwanted_octets += got - _SIZE
                        continue
                    if seen[0] != word:
                        if not self._takes(seen[0]):
                            left = self._left(view[start : start + min(got, room)], scratch[: max(got - room, 0)])
                            break
                        _count(receiveq, word, written[counted:])
                        word, counted = seen[0], len(written)
                    usual = seen
                    break
                else:
                    break  # others have their turn
                if left is not None:
                    break
                if behind:
                    _count(receiveq, word, written[counted:])
                    _count(receiveq, word, [got])
                    view[start + _COUNT_LOW], view[start + _COUNT_HIGH] = (behind + 1) & 0xFF, behind + 1 >> 8
                    written.append(room)
                    written += fill(view, [*islice(buffers, behind)], (scratch[: got - room],), got - room)
                    counted = len(written)
                    spread += behind
                    long_octets += got
                    behind = 0
                    if long_octets > _MOST:
                        break
                    continue
                view[start + _COUNT_LOW] = 1
                view[start + _COUNT_HIGH] = 0
                written.append(got)
        except OSError as error:
            # With its traceback it and this frame would refer to each other: garbage of each burst, with views in it.
            end = error.with_traceback(None)
        finally:
            singles.end(written)
        _count(receiveq, word, written[counted:])
        self.filtered += unwanted
        delivered = len(written) - spread
        octets = sum(written) - _SIZE * delivered + unwanted_octets
        return Read(delivered + unwanted, octets, left, end, room=True)

    def _buffers_behind(self, singles: Singles, first: int, got: int, most: int) -> int:
        """How many buffers it takes behind the ``first`` one for the rest of a frame; 0 where it is not to be spread.

        So it is with one that is longer than the driver's MTU, without MRG_RXBUF, and where there are too few buffers.
        """
        _, start, room = singles.buffers[first]
        whole = got > most and not singles.view[start + 1]  # gso_type
        if whole or not self._mergeable or room < _LEAST or got <= room:
            return 0
        end, rest = first + 1, got - room
        while rest > 0:
            if end - first == MAX_SPREAD or (end == len(singles.buffers) and not singles.more(_MORE)):
                return 0
            rest -= singles.buffers[end][2]
            end += 1
        return end - first - 1

    def copy_burst(self, source: memoryview, spans: Sequence[tuple[int, int]]) -> int:
        """See `burst_copier`."""
        if not self._open or self._rest is not None or not self.steering.trivial or spans[0][1] > _LONG:
            return 0
        receiveq = self.queues[0]
        try:
            singles = receiveq.queue.take_singles(len(spans), writable=True)
        except GuestError as error:
            self._fail(error)
            return 0
        if singles is None:
            return 0
        view, buffers, header, size = singles.view, singles.buffers, self._plain, self._size
        most, wanted, look = min(self._limit, _LONG), self.filter, _HEAD.unpack_from
        written: list[int] = []
        usual = None
        unwanted = 0
        try:
            for at, length in spans[: len(buffers)]:
                if not _HEAD.size <= length <= most:
                    break
                seen = look(source, at)
                if seen != usual:
                    if not wanted.everything and not wanted.accepts(Frame((source[at : at + length],), length)):
                        unwanted += 1
                        continue
                    usual = seen
                _, start, room = buffers[len(written)]
                total = size + length
                if total > room:
                    break
                view[start : start + total] = header + source[at : at + length]
                written.append(total)
        finally:
            singles.end(written)
        self.filtered += unwanted
        if written:
            receiveq.count(None, sum(written) - size * len(written), len(written))
        return len(written) + unwanted

    def _takes(self, word: int) -> bool:
        """Whether the driver takes a header with these flags (low byte) and gso_type as it is."""
        flags, gso_type = word & 0xFF, word >> 8
        return not flags & ~FLAGS and not needs(Offload(flags, gso_type, 0, 0, 0, 0)) & ~self._does

    @staticmethod
    def _left(begin: memoryview, rest: memoryview) -> Frame:
        """A frame that is not of the usual kind, with its header."""
        data = memoryview(b"".join((begin, rest)).ljust(_SIZE, b"\0"))
        fields = _FIELDS.unpack_from(data)
        offload = Offload(*fields) if fields[0] or fields[1] else None
        return Frame((data[_SIZE:],), len(data) - _SIZE, offload)


def _count(receiveq: ReceiveQueue, word: int, written: list[int]) -> None:
    """Frames whose headers have these flags and gso_type have been delivered, in so many bytes each."""
    if written:
        offload = Offload(word & 0xFF, word >> 8, 0, 0, 0, 0) if word else None
        receiveq.count(offload, sum(written) - _SIZE * len(written), len(written))
