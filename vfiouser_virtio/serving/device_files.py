"""Device classes from the user's files: ``my_device.py:MyDevice``."""

import importlib.util
import stat
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vfiouser_virtio import late_modules
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.virtio import Device

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice


def load_device_class(driver: str) -> "type[AnyDevice]":
    """The class that ``file.py:Class`` names; a file is imported once, however often it is named.

    Raises ConfigError when there is no such file or class, when it is no device, and when the import fails.
    """
    path, _, name = driver.partition(":")
    module = import_file(Path(path))
    own = [key for key, value in vars(module).items() if is_device(value) and value.__module__ == module.__name__]
    if not name:
        known = ", ".join(f"{path}:{key}" for key in own) or f"{path}:MyDevice"
        raise ConfigError(f"{path}: name its class too: {known}")
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"{path}: there is no class {name}; its devices: {', '.join(own) or 'none'}")
    if not is_device(found):
        raise ConfigError(f"{driver} is not a subclass of vfiouser_virtio.Device or vfiouser_virtio.pci.PciDevice")
    device_class: type[AnyDevice] = found
    if not issubclass(device_class, Device):
        if getattr(device_class, "identity", None) is None:
            raise ConfigError(f"{driver}: it has no identity: write identity = Identity(vendor=…, device=…)")
    elif not 0 < device_class.device_id < 64:
        raise ConfigError(f"{driver}: device_id is {device_class.device_id}; set it to a virtio device id, 1 to 63")
    return device_class


def is_device(value: object) -> bool:
    """Whether this is the class of an author's device, of either kind."""
    if not isinstance(value, type):
        return False
    if issubclass(value, Device):
        return value is not Device
    from vfiouser_virtio.pci.device import PciDevice  # only here: see `device_kinds`

    return issubclass(value, PciDevice) and value is not PciDevice


def _import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def import_file(path: Path, what: str = "device file") -> ModuleType:
    """The module of a Python file of the user's, imported once. Raises ConfigError, with ``what`` in it."""
    try:
        path = path.resolve(strict=True)
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    # Unique, and no name that an import statement could mean.
    name = f"vfiouser_virtio device file {path}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # What lies beside the file, or beside its folder, can be imported, but never hides a module of Python's own.
    _import_from(path.parent)
    if not path.parent.parent.stat().st_mode & stat.S_IWOTH:  # not from /tmp, where other users could put modules
        _import_from(path.parent.parent)
    # Before it runs: dataclasses and typing.get_type_hints() look a class's module up there.
    before = set(sys.modules)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        late_modules.load_all_of(new for key, new in list(sys.modules.items()) if key not in before)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{what} {path}{line}: {type(error).__name__}: {error}") from error
    return module
