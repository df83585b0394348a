"""Device types that come with the package: one module or folder each, announced to the bus, which imports them."""

from importlib import import_module

from vfiouser_virtio.protocols.virtio.device_types import DECLARED
from vfiouser_virtio.virtio import Device, bus

SHIPPED = tuple(sorted(DECLARED.values()))
"""The types, which are the names of their modules; a test compares them with the folder."""


def load(name: str) -> type[Device]:
    """The class of a shipped type. Imports no other: a server's start must not grow with their number."""
    return bus.match(name)


def example(name: str) -> Device:
    """A device of a shipped type that needs nothing of the host, with all that the type can do: for tests and fuzzers.

    A module says with ``example()`` how that is made, where its class without options is not it. Raises ConfigError for
    a type that cannot be made so.
    """
    device_class = load(name)
    make = getattr(import_module(device_class.__module__), "example", device_class)
    made: Device = make()
    return made


for _number, _name in DECLARED.items():
    bus.announce(_name, _number, f"{__name__}.{_name}")
