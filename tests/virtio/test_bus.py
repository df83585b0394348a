"""The device-side bus: classes by id and by name, modules that are imported when they are needed, overrides."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.virtio import Bus, Device

MODULE = """
from vfiouser_virtio.virtio import Device
import builtins
class Lazy(Device):
    device_id = 40
builtins.test_bus.register(Lazy)
"""


class Echo(Device):
    device_id = 63


@pytest.fixture
def announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """A bus to which a module is announced that nobody has imported."""
    (tmp_path / "lazy_device.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    bus = Bus()
    monkeypatch.setattr("builtins.test_bus", bus, raising=False)
    bus.announce("lazy", 40, "lazy_device")
    yield bus
    sys.modules.pop("lazy_device", None)


def test_the_bus_finds_the_class_by_device_id() -> None:
    bus = Bus()
    assert bus.register(Echo) is Echo
    assert isinstance(bus.create(63), Echo)
    assert isinstance(bus.create("echo"), Echo)

    class Other(Echo):
        pass

    with pytest.raises(ValueError, match="served by Echo"):
        bus.register(Other)
    bus.register(Other, override=True)
    assert bus.classes == [Other]
    with pytest.raises(ConfigError, match="device id 5"):
        bus.match(5)
    with pytest.raises(ConfigError, match='the name "balloon"'):
        bus.match("balloon")

    class Nameless(Device):
        pass

    with pytest.raises(ValueError, match="not 1 to 63"):
        bus.register(Nameless)


@pytest.mark.parametrize("wanted", [40, "lazy"])
def test_an_announced_module_is_imported_when_it_is_needed(announced: Bus, wanted: int | str) -> None:
    announced.register(Echo)
    assert announced.names == ["echo", "lazy"]
    assert announced.match("echo") is Echo
    assert "lazy_device" not in sys.modules
    assert announced.match(wanted).name == "lazy"
    assert "lazy_device" in sys.modules


def test_an_announced_type_is_replaced_only_explicitly(announced: Bus) -> None:
    class Mine(Device):
        device_id = 40

    with pytest.raises(ValueError, match=r"served by lazy_device already; override=True"):
        announced.register(Mine)
    announced.register(Mine, override=True)
    # The announced name stands for the id; and the module itself, imported late, takes nothing back.
    assert announced.match("lazy") is announced.match("mine") is announced.match(40) is Mine
    __import__("lazy_device")
    assert announced.match(40) is Mine


def test_a_class_can_be_taken_off_the_bus() -> None:
    bus = Bus()
    bus.register(Echo)
    bus.unregister(Echo)
    assert bus.names == []
    with pytest.raises(ConfigError, match="device id 63"):
        bus.match(63)
    with pytest.raises(LookupError, match="Echo serves no device id"):
        bus.unregister(Echo)
    assert bus.register(Echo) is bus.match(63)
