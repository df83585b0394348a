"""Traffic between two network devices that are on one network: what comes of the frames that one of them sends.

::

    source.send(frame) ─▶ transmitq ─▶ network ─▶ receiveq ─▶ sink.received()
    source.send(marker) ───────────────────────▶ everything before it has been seen to

Whether a frame does not arrive is known when the marker behind it has: nothing is waited for.
"""

from typing import NamedTuple

import trio

from vfiouser_virtio.testing.conformance.net.driver import COMPLETE, ConformanceDriver, Header, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.frames import STATION, is_marker, marker
from vfiouser_virtio.testing.conformance.verdicts import FrameLost, fail

RECEIVED, SENT = "virtio14/NR1", "virtio14/NX5"
"""Checks of plain frames, from the peer to the device and from the device to the peer."""

_AGAIN = 0.1  # seconds after which the first frame is sent again: a device may take its time to join a network


class SentPacket(NamedTuple):
    """Frame to be sent."""

    data: bytes
    header: Header = COMPLETE


class TrafficWay:
    """Way from one driver to another, both of which run."""

    def __init__(self, source: ConformanceDriver, sink: ConformanceDriver, to: bytes) -> None:
        self.source = source
        self.sink = sink
        self._to = to
        self._number = 0

    @classmethod
    async def open(
        cls, source: ConformanceDriver, sink: ConformanceDriver, *, to: bytes, rule: str = RECEIVED
    ) -> "TrafficWay":
        """Send frames to the address ``to`` until one arrives; ``rule`` is the check of that. Raises FrameLost."""
        way = cls(source, sink, to)
        with trio.move_on_after(source.bench.wire.timeout):
            while True:
                await way._mark(to)
                with trio.move_on_after(_AGAIN):
                    while not any(is_marker(each.data) for each in await sink.received()):  # noqa: ASYNC110
                        await trio.sleep(0.0005)
                    return way
        raise FrameLost(f"no frame arrives that is sent to {to.hex(':')}", rule)

    async def carry(self, *packets: SentPacket | bytes, to: bytes | None = None) -> list[ReceivedFrame]:
        """What arrives of these packets, in order. ``to``: where the marker behind them goes.

        Raises Failed where that does not arrive: others before it did.
        """
        for packet in packets:
            data, header = packet if isinstance(packet, SentPacket) else SentPacket(packet)
            await self.source.send(data, header)
        to = self._to if to is None else to
        last = await self._mark(to)
        found = await self.sink.receive(lambda each: each.data == last)
        if found is None:
            fail(f"a frame to {to.hex(':')} does not arrive any more")
        return [each for each in found if each.data[6:12] == STATION and not is_marker(each.data)]

    async def arrives(self, data: bytes, *, to: bytes | None = None) -> bool:
        """Whether this frame does."""
        return any(each.data == data for each in await self.carry(data, to=to))

    async def _mark(self, to: bytes) -> bytes:
        self._number += 1
        last = marker(to, self._number)
        await self.source.send(last)
        return last
