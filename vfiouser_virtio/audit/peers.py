"""Findings about known drivers, for docs/audit.md."""

from typing import NamedTuple


class Peer(NamedTuple):
    """BrokenRule of a driver that somebody ships, or that there is none."""

    driver: str
    date: str
    rule: str
    seen: str


PEERS: list[Peer] = []
