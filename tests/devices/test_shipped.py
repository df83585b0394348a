"""A device type is one declaration, one device and one driver: the table of types is the content of three folders."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

from vfiouser_virtio import devices
from vfiouser_virtio.guest import drivers
from vfiouser_virtio.guest.driver import VirtioDriver
from vfiouser_virtio.protocols import virtio
from vfiouser_virtio.protocols.virtio import device_types
from vfiouser_virtio.protocols.virtio.device_type import DeviceType
from vfiouser_virtio.protocols.virtio.device_types import DECLARED, declared_types, device_type
from vfiouser_virtio.protocols.virtio.features import FeatureBit
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.testing.fuzz import TARGETS
from vfiouser_virtio.virtio import Device, bus


def modules(path: list[str], package: str) -> dict[str, ModuleType]:
    return {found.name: importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)}


def test_the_list_is_the_folder() -> None:
    declared = sorted(DECLARED.values())
    formats = modules(list(virtio.__path__), virtio.__name__)
    assert [name for name, each in formats.items() if isinstance(getattr(each, "TYPE", None), DeviceType)] == declared
    of_devices = modules(list(devices.__path__), devices.__name__)
    with_devices = [
        name
        for name, module in of_devices.items()
        if any(
            isinstance(value, type) and issubclass(value, Device) and value.__module__ == module.__name__
            for value in vars(module).values()
        )
    ]
    assert list(devices.SHIPPED) == with_devices == declared
    of_drivers = modules(list(drivers.__path__), drivers.__name__)
    assert list(of_drivers) == declared
    assert all(issubclass(module.DRIVER, VirtioDriver) for module in of_drivers.values())


@pytest.mark.parametrize("number", DECLARED)
def test_a_declaration_is_complete_and_its_device_is_what_it_says(number: int) -> None:
    kind = device_type(number)
    assert (kind.device_id, kind.name) == (number, DECLARED[number])
    device_class = devices.load(kind.name)
    assert (device_class.device_id, device_class.name) == (number, kind.name)
    assert device_class.feature_bits is kind.features
    assert bus.match(number) is bus.match(kind.name) is device_class
    assert kind.exercise is not None
    assert kind.requests
    assert kind.linux_modules
    assert kind.name in TARGETS
    device = devices.example(kind.name)
    try:
        assert device.config.size == (kind.config.sizeof() if kind.config is not None else 0)
        sets = device.config[kind.sets.field] if kind.sets is not None else None
        assert not isinstance(sets, bytes)
        for index in range(len(device.queues)):
            assert kind.queue_index(kind.queue_name(index, sets), sets) == index
    finally:
        device.close()


def test_what_has_a_declaration_has_no_line_among_the_others() -> None:
    assert not DECLARED.keys() & device_types.OTHERS.keys()
    assert DECLARED.keys() | device_types.OTHERS.keys() <= set(DeviceId)


def test_the_fuzzer_knows_every_queue_of_a_type() -> None:
    for kind in declared_types():
        fuzzed = {queue for shape in kind.requests for queue in shape.queues}
        assert set(range(len(kind.queues))) <= fuzzed, kind.name


def test_a_feature_bit_has_one_mask() -> None:
    for kind in declared_types():
        if kind.features is not None:
            assert issubclass(kind.features, FeatureBit), kind.name


def test_one_device_does_not_import_the_others() -> None:
    code = (
        "import sys; from vfiouser_virtio import devices; from vfiouser_virtio.transports.identity import identity;"
        "devices.load('rng'); identity(4); print(*sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    folders = ("vfiouser_virtio.devices", "vfiouser_virtio.protocols.virtio")
    of_types = {f"{folder}.{name}" for folder in folders for name in DECLARED.values()}
    assert of_types & set(said) == {f"{folder}.rng" for folder in folders}
