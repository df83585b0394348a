"""The device types that come with the package, one module each, which registers its class on the bus when imported."""

from importlib import import_module

from vfiouser_virtio.virtio import Device

SHIPPED = ("blk", "console", "rng")
"""The types, which are the names of their modules, sorted; a test compares them with the folder."""


def load(name: str) -> type[Device]:
    """The class of a shipped type. Imports no other: a server's start must not grow with their number."""
    module = import_module(f"{__name__}.{name}")
    [found] = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Device)
        and value.__module__ == module.__name__
        and value.name == name
    )
    return found
