"""Hub netdev: a learning switch in this process that joins the network devices which name it.

A frame for a station that is known goes to that station's port, all others to every port; it is handed to the
receiving device in the call that brought it, uncopied, with its offloads where that device has asked for them. VLAN
tags are carried and not looked at. So are the groups that a bridge keeps to itself (IEEE 802.1D, 7.12.6): pause, STP,
LACP and LLDP go from guest to guest as over a cable.
"""

import logging
import struct
import threading
import weakref
from collections.abc import Sequence

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import LENGTH, Frame
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, FrameSink, Netdev
from vfiouser_virtio.backends.net.offload import BadOffload
from vfiouser_virtio.backends.net.outlet import AT_ONCE, Outlet
from vfiouser_virtio.errors import AuthorError

AGEING = 300.0
"""Seconds (and up to an eighth more) after which a station that has sent nothing is forgotten; Linux's bridge: 300."""
MAX_STATIONS = 1024
"""Addresses that are learned of one port. A guest that sends with a million of them only loses its own older ones."""
# Two hubs joined twice are a loop. A frame in it ends here, long before Python's stack does.
_MAX_DEPTH = 8
_NO_STATION = bytes(6)
_ADDRESSES = struct.Struct("12s")
_TICKS = 8

_hubs: "weakref.WeakValueDictionary[str, Hub]" = weakref.WeakValueDictionary()
_hubs_lock = threading.Lock()  # devices are made in threads


def hub(name: str) -> "Hub":
    """The hub of that name in this process, which is there as long as a port of it is."""
    with _hubs_lock:
        found = _hubs.get(name)
        if found is None:
            found = _hubs[name] = Hub()
        return found


class Hub:
    """Learning switch: the ports whose devices run, and the stations that were seen behind them."""

    def __init__(self) -> None:
        self.ports: tuple[HubNetdev, ...] = ()
        """Ports in use. A tuple, replaced on change: handing a frame to one may be what causes the change."""
        self.stations: dict[bytes, _Station] = {}
        """By address."""
        self.depth = 0
        """Calls of `HubNetdev.put` that are in progress, each caused by the one before."""


class _Station:
    __slots__ = ("port", "seen")

    def __init__(self, port: "HubNetdev", seen: int) -> None:
        self.port = port
        self.seen = seen


class HubNetdev(Link):
    """`Netdev` that is a port of a hub, by the hub's name; all ports are in one process and one event loop.

    An ``isolated`` port reaches only ports that are not, and is reached by those only.

    `Counters`: a frame that a device or guest has sent in vain (nobody there, no address, not allowed, lies) is
    in ``tx_drops`` of its port; one that the receiver had no room for is in ``rx_drops`` of the receiver's.
    """

    does = ALL

    def __init__(
        self,
        *,
        hub: str,
        isolated: bool = False,
    ) -> None:
        super().__init__(f"hub {hub}", link=True)
        self.hub = _hub(hub)
        self.isolated = isolated
        self.outlet = Outlet(self.counters)
        """The way to this port's device."""
        self._stations: dict[bytes, None] = {}  # of this port, the oldest first
        self._tick = 0
        self._blocked: Outlet | None = None  # what the last `put` found without room

    def put(self, frame: Frame) -> bool:
        return self.put_burst((frame,)) == 1

    def put_burst(self, frames: Sequence[Frame]) -> int:
        """Frames in a row with the same addresses are looked up once, and handed on together."""
        try:
            pairs = [_ADDRESSES.unpack_from(frame.segments[0])[0] for frame in frames]
        except (struct.error, IndexError):
            pairs = [frame.head(12) for frame in frames]
        start, count = 0, len(frames)
        if pairs.count(pairs[0]) == count:  # as mostly
            return self._put_run(pairs[0], frames)
        for stop in range(1, count + 1):
            if stop < count and pairs[stop] == pairs[start]:
                continue
            run = frames[start:stop]
            taken = self._put_run(pairs[start], run)
            if taken < len(run):
                return start + taken
            start = stop
        return count

    def _put_run(self, pair: bytes, frames: Sequence[Frame]) -> int:
        """Frames from one station to another, or to a group; how many of them were taken."""
        counters, hub, stations, count = self.counters, self.hub, self.hub.stations, len(frames)
        destination, source = pair[:6], pair[6:]
        station = stations.get(source)
        if station is not None and station.port is self:
            station.seen = self._tick
        elif not self._learn(source):
            counters.tx_drops.add(Drop.BAD_SENDER, count)
            return count
        if hub.depth == _MAX_DEPTH:
            counters.tx_drops.add(Drop.LOOP, count)
            return count

        hub.depth += 1
        try:
            station = stations.get(destination)  # never one for a group: none is learned
            if station is None:
                if not self._flood(frames):
                    return count
            elif station.port is self or (self.isolated and station.port.isolated):
                counters.tx_drops.add(Drop.OWN_PORT if station.port is self else Drop.ISOLATED, count)
                return count
            else:
                count = self._hand_on(station.port.outlet, frames)
        finally:
            hub.depth -= 1
        counters.tx_packets += count
        counters.tx_bytes += sum(map(LENGTH, frames[:count]))
        return count

    def _hand_on(self, outlet: Outlet, frames: Sequence[Frame]) -> int:
        taken = 0
        while taken < len(frames):
            try:
                count = outlet.take_burst(frames[taken:] if taken else frames)
            except BadOffload as error:
                self._drop(error, frames[taken])
                count = 1
            if not count:
                self._blocked = outlet
                break
            taken += count
        return taken

    def _flood(self, frames: Sequence[Frame]) -> bool:
        """Hand frames to all ports that this one reaches; False: there are none, and the frames are dropped."""
        isolated, others = self.isolated, [port for port in self.hub.ports if port is not self]
        reached = [port for port in others if not (isolated and port.isolated)]
        if not reached:
            self.counters.tx_drops.add(Drop.ISOLATED if others else Drop.NO_PEER, len(frames))
            return False
        at_once = AT_ONCE // len(reached)
        for frame in frames:
            try:
                for port in reached:
                    port.outlet.take_or_keep(frame, at_once)
            except BadOffload as error:
                self._drop(error, frame)
        return True

    def _drop(self, error: BadOffload, frame: Frame) -> None:
        counters = self.counters
        counters.tx_drops.add(Drop.BAD_OFFLOAD)
        # It is among those that `_put_run` counts as sent, at the end and together.
        counters.tx_packets -= 1
        counters.tx_bytes -= frame.length
        self.log.once("offload", "%s: a frame that was sent here is dropped: %s", self.describe(), error)

    async def wait_room(self) -> None:
        """Wait until the port that had no room has some, or is waited for no more."""
        blocked, self._blocked = self._blocked, None
        if blocked is not None:
            await blocked.wait_room()
        else:
            await trio.lowlevel.checkpoint()

    def _learn(self, address: bytes) -> bool:
        """Note that a station is here. False: that is no station's address (as Linux's ``is_valid_ether_addr``)."""
        if len(address) != len(_NO_STATION) or address[0] & 1 or address == _NO_STATION:
            return False
        known = self.hub.stations.get(address)
        if known is not None:  # it has moved here
            known.port.forget(address)
            self.log.once(
                "moved",
                "%s: %s was at another device's port before: its guest has moved, or both have one address (mac=)",
                self.describe(),
                address.hex(":"),
                level=logging.INFO,
            )
        if len(self._stations) >= MAX_STATIONS:
            self.forget(next(iter(self._stations)))
        self.hub.stations[address] = _Station(self, self._tick)
        self._stations[address] = None
        return True

    def forget(self, address: bytes) -> None:
        """Know no longer that a station is here."""
        del self._stations[address]
        del self.hub.stations[address]

    async def run(self, device: FrameSink) -> None:
        """Raises AuthorError where another device is on this port already."""
        if self.outlet.in_use:
            raise AuthorError(f"{self.describe()}: one port was given to two devices; make one for each")
        self.hub.ports = (*self.hub.ports, self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._age)
                await self.outlet.run(device)
        finally:
            self.hub.ports = tuple(port for port in self.hub.ports if port is not self)
            for address in list(self._stations):
                self.forget(address)

    async def _age(self) -> None:
        """Forget who has been silent: a clock that was read for every frame would cost a fifth of the frame's time."""
        while True:
            await trio.sleep(AGEING / _TICKS)
            self._tick += 1
            for address in [each for each in self._stations if self._tick - self.hub.stations[each].seen > _TICKS]:
                self.forget(address)

    def close(self) -> None:
        """Let go of nothing: `run` has left the hub."""


# The option, and so the parameter, has the same name.
_hub = hub


async def join(one: Netdev, other: Netdev) -> None:
    """Carry frames between two networks until cancelled: a hub's port and a tap, a hub's port and one of another hub.

    What is put into a netdev goes to the network behind it, and so does what the other one's ``run`` brings.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, other)
        nursery.start_soon(other.run, one)
