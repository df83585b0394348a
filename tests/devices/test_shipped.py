"""The list of shipped devices is the folder's content."""

import importlib
import pkgutil

from vfiouser_virtio import devices
from vfiouser_virtio.virtio import Device, bus


def test_the_list_is_the_folder() -> None:
    modules = {
        found.name: importlib.import_module(f"{devices.__name__}.{found.name}")
        for found in pkgutil.iter_modules(devices.__path__)
    }
    with_devices = [
        name
        for name, module in modules.items()
        if any(
            isinstance(value, type) and issubclass(value, Device) and value.__module__ == module.__name__
            for value in vars(module).values()
        )
    ]
    assert list(devices.SHIPPED) == with_devices


def test_each_is_on_the_bus_under_its_module_name() -> None:
    for name in devices.SHIPPED:
        device_class = devices.load(name)
        assert device_class.name == name
        assert bus.match(device_class.device_id) is device_class
