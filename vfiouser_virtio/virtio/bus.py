"""Virtio bus, device side: which class serves a virtio device id (after Arnd Bergmann's proposal of 2007).

A transport (a PCI function, the loopback) knows only a number; the bus finds the class and makes the child device. The
child knows nothing of what carries it.

::

    --device 5 ────────┐                                      @register
    --device balloon ──┴─▶ bus.match ─┬─ registered ─▶ class ◀────┐
                                      └─ announced ──▶ import of its module
"""

from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.virtio.device import Device

DeviceClass = TypeVar("DeviceClass", bound=type[Device])


class Announced(NamedTuple):
    """Module that registers the class of a device id when it is imported, as a module alias does in Linux."""

    device_id: int
    module: str


class Bus:
    """Table of device classes by virtio device id, and of modules that have more of them."""

    def __init__(self) -> None:
        self._classes: dict[int, type[Device]] = {}
        self._announced: dict[str, Announced] = {}
        self._overridden: set[int] = set()

    def register(self, device_class: DeviceClass, *, override: bool = False) -> DeviceClass:
        """Let ``device_class`` serve its `device_id`; usable as a decorator.

        Raises ValueError when the id is not 1 to 63, or is taken by another class and ``override`` is not set: one that
        is registered, or that an announced module would register.
        """
        number, module = device_class.device_id, device_class.__module__
        if not 0 < number < 64:
            raise ValueError(f"{device_class.__name__}.device_id is {number}, not 1 to 63")
        known = self._classes.get(number)
        announced = {each.module for each in self._announced.values() if each.device_id == number}
        if number in self._overridden and module in announced:
            return device_class  # its module was imported after it had been replaced
        taken = known.__name__ if known not in (None, device_class) else ""
        if known is None and announced - {module}:
            taken = min(announced)
        if taken and not override:
            raise ValueError(f"device id {number} is served by {taken} already; override=True replaces it")
        if override:
            self._overridden.add(number)
        self._classes[number] = device_class
        return device_class

    def unregister(self, device_class: type[Device]) -> None:
        """Let ``device_class`` serve nothing any more. Raises LookupError where it does not."""
        if self._classes.get(device_class.device_id) is not device_class:
            raise LookupError(f"{device_class.__name__} serves no device id")
        del self._classes[device_class.device_id]
        self._overridden.discard(device_class.device_id)

    def announce(self, name: str, device_id: int, module: str) -> None:
        """``module`` registers the class ``name`` of this id when it is imported; `match` imports it."""
        self._announced[name] = Announced(device_id, module)

    @property
    def classes(self) -> list[type[Device]]:
        """All registered classes, by device id."""
        return [self._classes[number] for number in sorted(self._classes)]

    @property
    def names(self) -> list[str]:
        """The names that `match` finds, sorted."""
        return sorted({*self._announced, *(each.name for each in self._classes.values())})

    def match(self, device: int | str) -> type[Device]:
        """The class that serves a device id, or that of a name. Imports its module where that was only announced.

        The name of an announced module stands for its device id, so an override serves it. Raises ConfigError when
        there is none.
        """
        number = self._number(device) if isinstance(device, str) else device
        if number not in self._classes:
            for announced in self._announced.values():
                if announced.device_id == number:
                    import_module(announced.module)
        try:
            return self._classes[number]
        except KeyError:
            what = f"virtio device id {device}" if isinstance(device, int) else f'the name "{device}"'
            raise ConfigError(f"no device class is registered for {what}") from None

    def create(self, device: int | str, **options: Any) -> Device:
        """A child device for a transport. Raises ConfigError or DeviceError for options that cannot be."""
        return self.match(device)(**options)

    def _number(self, name: str) -> int:
        if name in self._announced:
            return self._announced[name].device_id
        return next((number for number, each in self._classes.items() if each.name == name), 0)


bus = Bus()
"""The bus of this process, where the shipped devices and those of users register."""

register = bus.register
"""Decorator: register a class on `bus`."""
