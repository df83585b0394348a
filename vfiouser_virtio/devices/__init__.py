"""The device types that come with the package: one module or folder each, announced to the bus, which imports them."""

from vfiouser_virtio.protocols.virtio.device_types import DECLARED
from vfiouser_virtio.virtio import Device, bus

SHIPPED = tuple(sorted(DECLARED.values()))
"""The types, which are the names of their modules; a test compares them with the folder."""


def load(name: str) -> type[Device]:
    """The class of a shipped type. Imports no other: a server's start must not grow with their number."""
    return bus.match(name)


for _number, _name in DECLARED.items():
    bus.announce(_name, _number, f"{__name__}.{_name}")
