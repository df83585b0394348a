"""Pcap netdev: replays the packets of a capture file to the guest."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, FrameSink
from vfiouser_virtio.backends.net.pcap_file import BadCapture, Packet, packets
from vfiouser_virtio.backends.workers import Workers
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.protocols.pcap import PacketDirection

_PIECE = 256 << 10
# Packets that are read from the file in one call of a thread.
_BATCH = 64


class PcapNetdev(Link):
    """`Netdev` whose network is a capture file, pcapng or pcap: its packets come as they came when it was recorded.

    From the first packet each time that a driver takes the device over, until the last one. What the guest sends is
    dropped and counted. Raises DeviceError for a file that cannot be read, or is none of these.
    """

    does = ALL

    def __init__(
        self,
        *,
        pcap: Annotated[Path, "capture file to replay to the guest, pcapng or pcap"],
        at_once: Annotated[bool, "as fast as the guest takes them; off: at the pace they were recorded at"] = False,
        outbound: Annotated[bool, "those as well that the recorded interface itself has sent"] = False,
    ) -> None:
        super().__init__(f"pcap {pcap}", link=True)
        self._path = pcap
        self._at_once = at_once
        self._outbound = outbound
        self._workers = Workers("pcap", 1)
        try:
            next(packets(self._pieces()), None)
        except OSError as error:
            raise DeviceError(f"{self.describe()}: {error.strerror}") from None
        except BadCapture as error:
            raise DeviceError(f"{self.describe()}: {error}") from None

    def _pieces(self) -> Iterator[bytes]:
        # O_NONBLOCK: a FIFO without a writer is an empty file instead of a server that hangs.
        fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while piece := os.read(fd, _PIECE):
                yield piece
        finally:
            os.close(fd)

    def put(self, frame: Frame) -> bool:
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        self.counters.tx_drops.add(Drop.NO_NETWORK)
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:
        try:
            await self._replay(device)
        except OSError as error:
            self.log.error("%s: %s: the replay ends", self.describe(), error.strerror)
        except BadCapture as error:
            self.log.error("%s: %s: the replay ends", self.describe(), error)
        await trio.sleep_forever()

    async def _replay(self, device: FrameSink) -> None:
        reading: Iterator[Packet] | None = None

        def read() -> tuple[list[Packet], BadCapture | None]:
            """The next packets, and what is wrong with the one after them."""
            nonlocal reading
            batch: list[Packet] = []
            try:
                if reading is None:
                    reading = packets(self._pieces())
                batch.extend(itertools.islice(reading, _BATCH))  # leaves in it what came before the exception
            except BadCapture as error:
                return batch, error
            return batch, None

        begin: float | None = None
        first_ns = 0
        batch, damage = await self._workers.run(read)
        while batch:
            for packet in batch:
                if packet.direction is PacketDirection.OUTBOUND and not self._outbound:
                    continue
                if begin is None:
                    begin, first_ns = trio.current_time(), packet.time_ns
                if not self._at_once:
                    await trio.sleep_until(begin + (packet.time_ns - first_ns) / 1e9)
                await self._send(device, packet.data)
            if damage is not None:
                break
            batch, damage = await self._workers.run(read)
        if damage is not None:
            raise damage

    async def _send(self, device: FrameSink, data: bytes) -> None:
        if len(data) > MAX_FRAME:
            self.counters.rx_drops.add(Drop.TOO_LONG)
            self.log.once("long", "%s: a packet of %#x bytes is left out", self.describe(), len(data))
            return
        await self.hand_over(frame_of(data), device)

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: the file is opened anew for each driver."""
        return HostAccess(reads=(self._path,))

    def close(self) -> None:
        self._workers.close()
