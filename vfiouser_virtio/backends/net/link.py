"""State that all netdevs with a peer share: whether it is there, who waits to hear of it, and what went through."""

import logging

import trio

from vfiouser_virtio.backends.net.netdev import Counters
from vfiouser_virtio.device_log import DeviceLog, id_in_making

logger = logging.getLogger(__name__)


class Link:
    """Link and counters of a `Netdev`; one is its base class or its part."""

    def __init__(self, description: str, *, link: bool) -> None:
        self.link = link
        self.counters = Counters()
        self.log = DeviceLog(logger, id_in_making() or "netdev")
        self._description = description
        self._changed = trio.lowlevel.ParkingLot()

    def describe(self) -> str:
        return self._description

    def name_it(self, description: str) -> None:
        """What `describe` says from now on."""
        self._description = description

    async def wait_link(self) -> None:
        await self._changed.park()

    def set_link(self, up: bool) -> None:
        """Say whether there is a network at the other end."""
        if up is not self.link:
            self.link = up
            self._changed.unpark_all()
