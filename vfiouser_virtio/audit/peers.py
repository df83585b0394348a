"""What known drivers were found to do: for docs/audit.md."""

from typing import NamedTuple


class Peer(NamedTuple):
    """BrokenRule of a driver that somebody ships, or that there is none."""

    driver: str
    date: str
    rule: str
    seen: str


PEERS: list[Peer] = []
