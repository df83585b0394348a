"""The virtio bus, device side: which class serves a virtio device id (after Arnd Bergmann's proposal of 2007).

A transport (a PCI function, the loopback) knows only a number; the bus finds the class and makes the child device. The
child knows nothing of what carries it.
"""

from typing import Any, TypeVar

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.virtio.device import Device

DeviceClass = TypeVar("DeviceClass", bound=type[Device])


class Bus:
    """A table of device classes by virtio device id."""

    def __init__(self) -> None:
        self._classes: dict[int, type[Device]] = {}

    def register(self, device_class: DeviceClass, *, override: bool = False) -> DeviceClass:
        """Let ``device_class`` serve its `device_id`; usable as a decorator.

        Raises ValueError when the id is not 1 to 63, or is taken by another class and ``override`` is not set.
        """
        number = device_class.device_id
        if not 0 < number < 64:
            raise ValueError(f"{device_class.__name__}.device_id is {number}, not 1 to 63")
        known = self._classes.get(number)
        if known is not None and known is not device_class and not override:
            raise ValueError(f"device id {number} is served by {known.__name__} already; override=True replaces it")
        self._classes[number] = device_class
        return device_class

    @property
    def classes(self) -> list[type[Device]]:
        """All registered classes, by device id."""
        return [self._classes[number] for number in sorted(self._classes)]

    def match(self, device_id: int) -> type[Device]:
        """The class that serves a device id. Raises ConfigError when there is none."""
        try:
            return self._classes[device_id]
        except KeyError:
            raise ConfigError(f"no device class is registered for virtio device id {device_id}") from None

    def create(self, device_id: int, **options: Any) -> Device:
        """A child device for a transport. Raises ConfigError or DeviceError for options that cannot be."""
        return self.match(device_id)(**options)


bus = Bus()
"""The bus of this process, where the shipped devices and those of users register."""

register = bus.register
"""Decorator: register a class on `bus`."""
