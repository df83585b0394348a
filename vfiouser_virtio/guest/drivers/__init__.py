"""Drivers for the shipped device types, one module each. A program registers those it wants on a bus of its own."""

from vfiouser_virtio.guest.driver import VirtioDriver
from vfiouser_virtio.guest.drivers.blk import BlkDriver, Disk, RequestFailed
from vfiouser_virtio.guest.drivers.console import Console, ConsoleDriver, ConsolePort
from vfiouser_virtio.guest.drivers.rng import Entropy, EntropyDriver

ALL_DRIVERS: tuple[type[VirtioDriver], ...] = (BlkDriver, ConsoleDriver, EntropyDriver)
"""The driver classes, in the order of their modules."""

__all__ = [
    "ALL_DRIVERS",
    "BlkDriver",
    "Console",
    "ConsoleDriver",
    "ConsolePort",
    "Disk",
    "Entropy",
    "EntropyDriver",
    "RequestFailed",
]
