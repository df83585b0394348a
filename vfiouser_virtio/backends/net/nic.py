"""Network side of a network card: its end of the cable, for devices whose rings are no virtqueues.

::

    driver's ring ──▶ device ──▶ Nic.send ──▶ netdev              network
    driver's ring ◀── device ◀── Nic.receive ◀── FIFO ◀── netdev.run

A card reaches guest memory only in tasks of its own (`PciDevice.run`), while a netdev hands over a frame in a call:
between them is a FIFO, as in a card of silicon. While it is full the netdev waits, or drops, as with any device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter

import trio

from vfiouser_virtio.backends.changes import tell_changes
from vfiouser_virtio.backends.net.drops import Drop, DropReport, Drops
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import Does, Netdev, burst_putter
from vfiouser_virtio.backends.net.offload import BadOffload, check, finish
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.turns import turns

BURST = 64
"""Segments that are made before others have a look, and handed to the netdev at once."""
FIFO_SIZE = 48 << 10
"""Bytes of frames that wait for the driver's buffers."""


def _all(_head: bytes) -> bool:
    return True


def _nothing() -> None: ...


class Nic:
    """`FrameSink` of a card on a ``netdev``, which it closes; frames of the network are complete and wait as bytes.

    ``fifo`` is how many bytes of them may wait: one frame always may. The card sets ``receiving``, which a reset of its
    own does not, and may set ``wants`` and ``on_link``.
    """

    does = Does(0)

    def __init__(self, netdev: Netdev, log: DeviceLog, *, fifo: int = FIFO_SIZE) -> None:
        self.netdev, self.log = netdev, log
        self.receiving = False
        """Whether the card takes frames: they are dropped while it does not."""
        self.wants: Callable[[bytes], bool] = _all
        """Whether the driver is to see a frame that begins with these bytes, 18 of them if there are so many."""
        self.on_link: Callable[[], None] = _nothing
        """Called after each change of `link`."""
        self.filtered = 0
        """Frames that were not wanted."""
        self.drops_to_guest, self.drops_from_guest = Drops(), Drops()
        self.report = DropReport(
            log,
            netdev.describe,
            to_guest=(netdev.counters.rx_drops, self.drops_to_guest),
            from_guest=(netdev.counters.tx_drops, self.drops_from_guest),
            totals=lambda: str(netdev.counters),
        )
        """What the user is told of frames that were dropped."""
        self._fifo: deque[bytes] = deque()
        self._octets, self._size, self._full = 0, fifo, False
        self._running, self._link, self._shown = False, True, netdev.link
        self._arrived, self._room = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._put_burst = burst_putter(netdev)

    # ---- for the card --------------------------------------------------------------------------------------------

    @property
    def link(self) -> bool:
        """Whether the link is up: where it is by `set_link`, and by the netdev."""
        return self._link and self.netdev.link

    def set_link(self, up: bool) -> None:
        """Take the link down, or let it be up again where the netdev's is. For tests of drivers."""
        self._link = up
        self._show_link()

    @property
    def waiting(self) -> int:
        """Frames in the FIFO."""
        return len(self._fifo)

    async def receive(self) -> bytes:
        """The next frame, from the destination address on, without FCS, as it was sent: it may be short."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._fifo:
            await self._arrived.park()
        data = self._fifo.popleft()
        self._octets -= len(data)
        self._make_room()
        return data

    async def send(self, frames: Sequence[Frame]) -> list[BadOffload | None]:
        """Send frames, in order, when the network has room for them, and what it does not do of their offloads is done.

        Returns for each what is wrong with its offload, if something is: that frame is dropped, and counted. So are all
        while there is no link.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        wrong: list[BadOffload | None] = [None] * len(frames)
        if not self.link:
            self.drops_from_guest.add(Drop.LINK_DOWN, len(frames))
            return wrong
        slice_end, _ = turns().woken(0)
        ready: list[Frame] = []
        for number, frame in enumerate(frames):
            if frame.offload is None:
                ready.append(frame)
                continue
            try:
                check(frame)
                pieces = iter(finish(frame, self.netdev.does))
            except BadOffload as error:
                wrong[number] = error.with_traceback(None)  # whose frame has the list
                self.drops_from_guest.add(Drop.MALFORMED)
                continue
            # A driver's 64 packets of 64 KiB are 65,536 segments if it likes: not all at once, nor without a pause.
            while some := list(islice(pieces, BURST)):
                ready += some
                if len(ready) >= BURST:
                    await self._put_all(ready)
                    ready = []
                    if perf_counter() > slice_end:
                        slice_end = await turns().wait()
        await self._put_all(ready)
        return wrong

    async def _put_all(self, frames: list[Frame]) -> None:
        while frames:
            del frames[: self._put_burst(frames)]
            if frames:
                await self.netdev.wait_room()

    async def run(self) -> None:
        """Be on the network, until cancelled; then what is in the FIFO is dropped."""
        self._running = True
        self._show_link()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.netdev.run, self)
                nursery.start_soon(tell_changes, self.netdev.wait_link, self._show_link)
                nursery.start_soon(self.report.run)
        finally:
            self._running = False
            self.flush()

    def flush(self) -> None:
        """Empty the FIFO: the driver has reset the card, or is gone."""
        self.drops_to_guest.add(Drop.DRIVER_LEFT, len(self._fifo))
        self._fifo.clear()
        self._octets = 0
        self._make_room()

    def close(self) -> None:
        """The card is no longer served: say what was dropped, and let go of the netdev."""
        self.report.end()
        self.netdev.close()

    def _make_room(self) -> None:
        self._full = False
        self._room.unpark_all()

    def _show_link(self) -> bool:
        """Tell the card, where it does not know; whether that was so."""
        if self._shown is self.link:
            return False
        self._shown = self.link
        self.log.info("the link is %s", "up" if self.link else "down")
        self.on_link()
        return True

    # ---- for the netdev ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        """See `FrameSink`."""
        if not self._running or not self.receiving or not self.link:
            self.drops_to_guest.add(Drop.NO_DRIVER if self.link else Drop.LINK_DOWN)
            return True
        if not self.wants(frame.head(18)):
            self.filtered += 1
            return True
        if self._fifo and self._octets + frame.length > self._size:
            self._full = True
            return False
        try:
            for piece in (frame,) if frame.offload is None else finish(frame, 0):
                self._fifo.append(piece.tobytes())
                self._octets += piece.length
        except BadOffload as error:
            self.drops_to_guest.add(Drop.BAD_OFFLOAD)
            self.log.once("bad offload of the network", "a frame of the network is dropped: %s", error)
        self._arrived.unpark()
        return True

    async def wait_room(self) -> None:
        """See `FrameSink`."""
        if self._full:
            await self._room.park()
        else:
            await trio.lowlevel.checkpoint()
