"""Leases of a DHCP server: which station has which address, and until when."""

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

LEASE_TIME = 24 * 3600
"""Seconds, as QEMU's user network gives them."""
OFFER_TIME = 60
"""Seconds that an address is kept for a station which has not taken it."""
DECLINE_TIME = 300
"""Seconds that an address is not given out after a station has found it in use."""
MAX_ADDRESSES = 256
"""Addresses that are given out at most: a guest that makes up stations has so many entries of ours, and no more."""


class Leases:
    """Addresses of a pool, one for each station (by its hardware address) that has asked for one.

    One that is taken stays its station's until it expires: a guest that asks for others in the name of stations that
    it makes up uses up the pool, and has nobody's lease taken away. ``clock`` says the time in seconds.
    """

    def __init__(self, pool: Sequence[IPv4Address], clock: Callable[[], float]) -> None:
        self.pool = pool[:MAX_ADDRESSES]
        self._clock = clock
        self._leases: dict[bytes, tuple[IPv4Address, float]] = {}
        self._stations: dict[IPv4Address, bytes] = {}
        self._members = frozenset(self.pool)
        self._declined: dict[IPv4Address, float] = {}

    def __len__(self) -> int:
        """Addresses that are offered or taken."""
        self._expire()
        return len(self._leases)

    def offer(self, mac: bytes, wanted: IPv4Address | None) -> IPv4Address | None:
        """An address for a station, the one that it wants if that is free; None where there is none left."""
        self._expire()
        if (known := self._leases.get(mac)) is not None:
            return known[0]
        if wanted is None or not self._is_free(wanted):
            wanted = next((each for each in self.pool if self._is_free(each)), None)
        if wanted is not None:
            self._keep(mac, wanted, OFFER_TIME)
        return wanted

    def take(self, mac: bytes, address: IPv4Address) -> bool:
        """Lease an address to a station; False where it is another's, or the station has another one."""
        self._expire()
        known = self._leases.get(mac)
        if known[0] != address if known is not None else not self._is_free(address):
            return False
        self._keep(mac, address, LEASE_TIME)
        return True

    def withdraw(self, mac: bytes) -> None:
        """Keep nothing for a station."""
        if (known := self._leases.pop(mac, None)) is not None:
            del self._stations[known[0]]

    def release(self, mac: bytes, address: IPv4Address) -> None:
        """Have an address back from its station."""
        if self._stations.get(address) == mac:
            self.withdraw(mac)

    def decline(self, mac: bytes, address: IPv4Address) -> None:
        """Give out an address no more for a while: its station has found it in use."""
        if self._stations.get(address) == mac:
            self.withdraw(mac)
            self._declined[address] = self._clock() + DECLINE_TIME

    def _is_free(self, address: IPv4Address) -> bool:
        return address in self._members and address not in self._stations and address not in self._declined

    def _keep(self, mac: bytes, address: IPv4Address, seconds: float) -> None:
        self._leases[mac] = (address, self._clock() + seconds)
        self._stations[address] = mac

    def _expire(self) -> None:
        now = self._clock()
        for mac in [mac for mac, (_, until) in self._leases.items() if until <= now]:
            self.withdraw(mac)
        for address in [address for address, until in self._declined.items() if until <= now]:
            del self._declined[address]
