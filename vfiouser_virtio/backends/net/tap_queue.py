"""Queue of a TAP interface: frames through one file descriptor, each with struct virtio_net_hdr before it."""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import LENGTH, Frame, Offload
from vfiouser_virtio.backends.net.link import FileInput, wait_writable
from vfiouser_virtio.backends.net.netdev import (
    MAX_FRAME,
    Does,
    FrameSink,
    PutBurst,
    Read,
    ReadBurst,
    burst_putter,
    burst_reader,
)
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.tun import IfFlags
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HDR_TUNNEL_CODEC

if TYPE_CHECKING:
    from vfiouser_virtio.backends.net.tap import TapNetdev

# The interface is down, or was deleted.
_DOWN = {errno.EIO, errno.EBADFD}
_QUIET = {errno.EIO}
# Frames that the device is handed together, and bytes of them, but for the last.
_BURST, _ROOM = 64, 128 << 10
# Buffers of the driver that are taken while so many frames do not come together: to take 64 is as long as all the rest.
_FEW = 4
# Bursts that are read into a buffer of ours after a frame that was too long for the driver's: the next ones may be too.
_AFTER_LONG = 16
# Seconds that a driver without buffers is waited for without a look at whether the interface is still there.
_LOOK = 1.0
# Frames that are thrown away at once; Linux keeps 1000 of a TAP interface.
_MAX_DRAIN = 4096


class VnetHeader:
    """Header before each frame of an interface, in both directions: one of two lengths (TUNSETVNETHDRSZ).

    It is that of most drivers' rings, with num_buffers at its end, of which the kernel knows nothing: so a frame can
    be read to where the driver wants it.
    """

    def __init__(self, codec: struct.Struct = HDR_CODEC) -> None:
        self.use(codec)

    def use(self, codec: struct.Struct) -> None:
        """Have this one: HDR_CODEC, or with tunnels HDR_TUNNEL_CODEC."""
        self.codec = codec
        self.size = codec.size
        self.complete = bytes(codec.size)
        """That of a frame with which nothing is left to be done."""

    def pack(self, offload: Offload) -> bytes:
        """That of any other frame."""
        if self.codec is HDR_TUNNEL_CODEC:
            return self.codec.pack(*offload[:6], 0, 0, 0, 0, *offload[6:])
        return self.codec.pack(*offload[:6], 0)

    def unpack(self, header: memoryview) -> Offload:
        """What one says."""
        fields = self.codec.unpack(header)
        return Offload(*fields[:6]) if self.codec is HDR_CODEC else Offload(*fields[:6], *fields[-2:])


class TapQueue:
    """`FrameSink` for the guest's frames, and source of the host's; ``header`` is None for frames without one."""

    def __init__(self, netdev: "TapNetdev", index: int, fd: int, header: VnetHeader | None) -> None:
        self.netdev = netdev
        self.index = index
        self.does = Does(0)
        self.attached = True
        """The host uses it; the first one always is."""
        self._fd = fd
        self._header = header
        self._buffer = memoryview(bytearray(_ROOM + HDR_TUNNEL_CODEC.size + MAX_FRAME))
        self._frames = [Frame((), 0) for _ in range(_BURST)]  # of a burst: to make one takes as long as five statements
        self._turn = trio.Lock()
        self._reattached = trio.Event()
        self._input = FileInput()
        self._reader: ReadBurst | None = None
        """While `run` waits for frames that can be read straight to the driver's buffers: what does so."""
        self._left: Frame | None = None
        """One that was read meanwhile, and is for `run` to hand on."""
        self._many = False
        """Whether `_FEW` frames or more have come together at last."""

    # ---- from the guest ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        """See `FrameSink`."""
        header, netdev = self._header, self.netdev
        if header is None:
            segments = frame.for_kernel()
        elif frame.offload is None:
            segments = frame.for_kernel(header.complete)
        else:
            segments = frame.for_kernel(header.pack(frame.offload))
        try:
            os.writev(self._fd, segments)
        except BlockingIOError:
            return False
        except OSError as error:  # EIO: it is down; EINVAL: a header that the kernel does not believe
            if not self.attached:
                return netdev.queues[0].put(frame)
            netdev.lose(frame, error, _DOWN, quiet=_QUIET)
            return True
        netdev.counters.tx_packets += 1
        netdev.counters.tx_bytes += frame.length
        return True

    async def wait_room(self) -> None:
        """See `FrameSink`."""
        queue = self if self.attached else self.netdev.queues[0]
        await wait_writable(lambda: queue._fd, queue._turn)  # noqa: SLF001 - of the same class

    # ---- from the host -------------------------------------------------------------------------------------------

    async def run(self, device: FrameSink) -> None:
        """Hand the frames of this queue to the device, while it is attached, until cancelled."""
        try:
            while await self._receive(device):
                await self._reattached.wait()
        except trio.ClosedResourceError:
            pass
        await trio.sleep_forever()

    async def _receive(self, device: FrameSink) -> bool:
        """False: the interface is gone; True: the queue is not attached."""
        put, reader = burst_putter(device), burst_reader(device)
        counters, header = self.netdev.counters, self._header
        elsewhere, waited = 0, False
        while True:
            done = None
            usable = reader if header is not None and not elsewhere else None
            if usable is not None:
                done = self._read_straight(usable)
            if done is None:
                elsewhere = max(elsewhere - 1, 0)
                frames, end = self._read()
                await self._hand_on(frames, device, put)
            elif not done.room:
                # None of one piece, it may be: then there is room at once, and it is for `put` to say what that is.
                elsewhere, waited = int(waited), True
                await self._wait_for_room(device)
                continue
            else:
                waited, end = False, done.end
                if done.left is not None:
                    elsewhere = _AFTER_LONG
                    await self._hand_on([done.left], device, put)
            if end is None:
                await trio.lowlevel.checkpoint()
            elif isinstance(end, BlockingIOError):
                if (left := await self._wait_readable(usable)) is not None:
                    elsewhere = _AFTER_LONG
                    await self._hand_on([left], device, put)
            elif not self.attached:
                return True
            elif end.errno == errno.EINVAL:  # one of a tunnel that is left of a driver that took them
                counters.rx_drops.add(Drop.NO_DRIVER)
                await trio.lowlevel.checkpoint()
            else:
                self._is_gone(end)
                return False

    async def _hand_on(self, frames: Sequence[Frame], device: FrameSink, put: PutBurst) -> None:
        counters, taken = self.netdev.counters, 0
        try:
            while taken < len(frames):
                count = put(frames[taken:])
                counters.rx_packets += count
                counters.rx_bytes += sum(map(LENGTH, frames[taken : taken + count]))
                taken += count
                if taken < len(frames):
                    await self._wait_for_room(device)
        finally:  # its driver may leave meanwhile
            counters.rx_drops.add(Drop.DRIVER_LEFT, len(frames) - taken)

    async def _wait_for_room(self, device: FrameSink) -> None:
        """Or until the interface is found to be gone: with the link down, the device takes what is left, and drops it.

        Its driver may have no buffers for as long as it likes, and meanwhile nothing is read, which would tell.
        """
        with trio.move_on_after(_LOOK) as waiting:
            await device.wait_room()
        if waiting.cancelled_caught and self.attached and self._fd >= 0:
            try:
                fcntl.ioctl(self._fd, tun.TUNGETIFF, bytes(tun.IFREQ_CODEC.size))
            except OSError as error:
                self._is_gone(error)

    def _is_gone(self, error: OSError) -> None:
        """EBADFD: the interface was deleted."""
        self.netdev.log.once(error.errno, "%s: %s", self.netdev.describe(), error.strerror)
        self.netdev.set_link(False)

    def _read(self) -> tuple[list[Frame], OSError | None]:
        """What the host has sent, as far as `_BURST` and the buffer go, and how it ended: see `Read`."""
        header, buffer, frames, at, count = self._header, self._buffer, self._frames, 0, 0
        size = 0 if header is None else header.size
        while count < _BURST and at <= _ROOM:
            try:
                end = at + os.readv(self._fd, (buffer[at:],))
            except OSError as error:
                return frames[:count], error
            frame, begin = frames[count], at + size
            frame.segments, frame.length, frame.offload = (buffer[begin:end],), end - begin, None
            if header is not None and (buffer[at] or buffer[at + 1]):  # flags, gso_type
                frame.offload = header.unpack(buffer[at:begin])
            at = end
            count += 1
        return frames[:count], None

    def _read_straight(self, reader: ReadBurst) -> Read | None:
        """See `burst_reader`."""
        assert self._header is not None
        done = reader(self._fd, self._header.size, _BURST if self._many else _FEW, self._buffer)
        if done is not None:
            self._many = done.frames >= _FEW
            self.netdev.counters.rx_packets += done.frames
            self.netdev.counters.rx_bytes += done.octets
        return done

    async def _wait_readable(self, reader: ReadBurst | None) -> Frame | None:
        """Wait for frames, which ``reader`` may take meanwhile; one that it has left."""
        self._reader = reader
        try:
            await self._input.wait(self._fd)
            left, self._left = self._left, None
            return left
        finally:
            self._reader = None
            if self._left is not None:
                self._left = None
                self.netdev.counters.rx_drops.add(Drop.DRIVER_LEFT)

    def receive_nowait(self) -> bool:
        """See `nowait_receiver`."""
        reader = self._reader
        done = None if reader is None else self._read_straight(reader)
        if done is None or not done.room:
            return False
        if done.left is not None:
            self._left, self._reader = done.left, None
            self._input.look_again()
        return done.frames > 0 or done.left is not None

    def drain(self) -> None:
        """Throw away what the host has sent so far."""
        for _ in range(_MAX_DRAIN):
            try:
                os.readv(self._fd, [bytearray(HDR_TUNNEL_CODEC.size), self._buffer])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return
            self.netdev.counters.rx_drops.add(Drop.NO_DRIVER)

    # ---- several queues ------------------------------------------------------------------------------------------

    async def attach(self, on: bool) -> None:
        """Have the host use it, or no longer. What it holds for the guest is lost then, as the host's kernel has it."""
        if on == self.attached or self._fd < 0:
            return
        fd = self._fd

        def change() -> None:
            request = tun.IFREQ_CODEC.pack(b"", IfFlags.ATTACH_QUEUE if on else IfFlags.DETACH_QUEUE)
            self.attached = False  # before it is true: a read that fails is no surprise then
            try:
                fcntl.ioctl(fd, tun.TUNSETQUEUE, request)
                self.attached = on
            except OSError:
                self.attached = not on
                raise

        if not on:
            self._reattached = trio.Event()
        try:
            await trio.to_thread.run_sync(change)
        except OSError as error:
            self.netdev.log.once("queue", "%s: queue %d: %s", self.netdev.describe(), self.index, error.strerror)
        if self.attached:
            self._reattached.set()
        else:
            self._input.look_again()

    def close(self) -> None:
        """Let go of it; closing the last one ends an interface that was made here."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)
