"""Network of one device, which is a port of a hub whose other ports answer: so its learning of addresses is fuzzed.

::

    device ──▶ HubNetdev ──▶ Hub ──▶ two isolated ports that answer: with addresses swapped, stolen, new, or none

What must hold whenever nothing is on its way: a station is behind a port that is in use, has an address that a station
can have, and is one of `MAX_STATIONS` of its port at most.
"""

from collections import Counter, deque
from collections.abc import Callable
from itertools import count

import trio
import trio.testing

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.hub import MAX_STATIONS, Hub, HubNetdev
from vfiouser_virtio.backends.net.netdev import ALL, FrameSink
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import hdr_size
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.net_loop import be_promiscuous, net_with_everything
from vfiouser_virtio.testing.fuzz.oracle import Found

_ROOM = 8
"""Frames that an answering port keeps: a guest without receive buffers is not to make it wait."""
NEW = 40
"""Stations that are new with one answer in six: some dozens of answers, and a port has too many."""
_STRANGER = bytes([2, 0, 0, 0, 0, 9])
_PLAIN = b"\x88\xb6"
"""Type of frames that are always answered in the same way: whether all works is seen by them."""
_GOOD = (b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + _PLAIN).ljust(60, b"\x5a")
_MOST_BEFORE = 200
_LARGEST = 0x10100
"""Bytes for any frame: one that needs several buffers waits for all of them."""
_numbers = count()


def check_stations(hub: Hub) -> None:
    """Raise AssertionError for a station that cannot be."""
    assert hub.depth == 0, f"depth {hub.depth} with no frame on its way"
    for address, station in hub.stations.items():
        assert station.port in hub.ports, f"{address.hex()} is behind a port that nothing uses"
        assert len(address) == 6, f"a station {address.hex()}"
        assert any(address), "a station without an address"
        assert not address[0] & 1, f"a group {address.hex()} is a station"
    most = max(Counter(station.port for station in hub.stations.values()).values(), default=0)
    assert most <= MAX_STATIONS, f"{most} stations of one port"


class _Answering:
    """Sink of a port that answers each frame; the way changes from frame to frame."""

    does = ALL

    def __init__(self, port: HubNetdev) -> None:
        self._port = port
        self._seen = 0
        self._new = 0
        self._frames: deque[tuple[bytes, Offload | None]] = deque(maxlen=_ROOM)
        self._arrived = trio.lowlevel.ParkingLot()
        self._ways: tuple[Callable[[bytes, bytes], list[bytes]], ...] = (
            lambda to, source: [source + _of_a_station(to)],
            lambda to, source: [to + source],  # the station is here now, it says
            lambda to, source: [to + _STRANGER, source + _STRANGER],
            lambda _, source: [source + self._next() for _ in range(NEW)],
            lambda to, source: [source + bytes(6), source + b"\1" + to[1:], bytes(6) + _STRANGER],
            lambda _, source: [source + source, _STRANGER + _STRANGER],
        )

    def put(self, frame: Frame) -> bool:
        self._frames.append((frame.tobytes(), frame.offload))
        self._arrived.unpark_all()
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._port.run, self)
            while True:
                while not self._frames:
                    await self._arrived.park()
                data, offload = self._frames.popleft()
                check_stations(self._port.hub)
                self._seen += 1
                way = self._ways[2 if data[12:14] == _PLAIN else self._seen % len(self._ways)]
                for addresses in way(data[:6], data[6:12]):
                    self._port.put(frame_of(addresses + data[12:], offload))  # lost where there is no room
                check_stations(self._port.hub)

    def _next(self) -> bytes:
        self._new += 1
        return bytes([2, 1]) + self._new.to_bytes(4, "big")


def _of_a_station(address: bytes) -> bytes:
    return _STRANGER if not any(address) or address[0] & 1 else address


class AnsweringHub(HubNetdev):
    """Port of a hub of its own, whose other ports are there while the device runs."""

    def __init__(self) -> None:
        self._name = f"fuzz {next(_numbers)}"
        super().__init__(hub=self._name)

    async def run(self, device: FrameSink) -> None:
        """As `HubNetdev.run`."""
        async with trio.open_nursery() as nursery:
            ports = [HubNetdev(hub=self._name, isolated=True) for _ in range(2)]  # else they would answer each other
            for port in ports:
                nursery.start_soon(_Answering(port).run)
            await super().run(device)
            nursery.cancel_scope.cancel()


def hub_net() -> Net:
    """A network device that offers everything, on such a hub."""
    return net_with_everything(AnsweringHub())


async def hub_net_works(driver: FuzzDriver) -> None:
    """A command is answered, and a frame comes back behind all those that answer others. Raises Found."""
    await be_promiscuous(driver)
    await trio.testing.wait_all_tasks_blocked()  # what is sent before the hub's ports are in use is lost
    size = hdr_size(driver.features)
    for _ in range(_MOST_BEFORE):
        await driver.request(1, [bytes(size), _GOOD], [])  # of others so many may wait that there is no room for this
        offered = driver.offer(0, [], [_LARGEST])
        assert offered is not None
        head, [address] = offered
        await driver.kick(0)
        await driver.wait_used(driver.rings[0], head)
        if driver.ram.read(address + size, len(_GOOD)) == _GOOD[:6] + _STRANGER + _GOOD[12:]:
            return
    raise Found("broken", f"net: a frame does not come back behind {_MOST_BEFORE} others", "request")
