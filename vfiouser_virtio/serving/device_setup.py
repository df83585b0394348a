"""From what the user described to what can be served: a class, its arguments, a name and an identity."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vfiouser_virtio import devices
from vfiouser_virtio.device_log import being_made
from vfiouser_virtio.errors import AuthorError, ConfigError, DeviceError
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.serving.device_files import is_device_file, load_device_class
from vfiouser_virtio.serving.device_options import (
    CommonOptions,
    class_options,
    common_options,
    convert_options,
    offer_options,
    spelled,
    suggestion,
)
from vfiouser_virtio.serving.device_specs import DeviceSpec
from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Device, Offer, bus
from vfiouser_virtio.virtio.author_line import author_line

logger = logging.getLogger(__name__)

# Which field of an Identity each common option sets.
_IDENTITY_FIELDS = {
    "vendor_id": "vendor",
    "device_id": "device",
    "subsystem_vendor_id": "subsystem_vendor",
    "subsystem_id": "subsystem",
    "class_code": "class_code",
    "revision": "revision",
}
# QEMU's rule for ids (id_wellformed() in its util/id.c).
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """A device that can be made: all of its options are known and converted."""

    name: str
    """Unique among the devices of a process: blk0."""
    driver: str
    """As the user named its type."""
    device_class: type[Device]
    arguments: dict[str, Any]
    common: CommonOptions
    offer: Offer

    def identity(self, style: Style = "default") -> Identity:
        """What it shows in PCI config space: ``style``, or the device's own, and single fields changed after that."""
        chosen = {field: getattr(self.common, option) for option, field in _IDENTITY_FIELDS.items()}
        changes = {field: value for field, value in chosen.items() if value is not None}
        try:
            base = identity(self.device_class.device_id, self.common.ids or style)
            return dataclasses.replace(base, **changes)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def create(self, style: Style = "default") -> VirtioPci:
        """Make the device, on a PCI function of its own.

        Raises ConfigError for values that clash, DeviceError for what cannot be had, and for mistakes of the device's
        author: with the line of the author's code.
        """
        shown = self.identity(style)
        try:
            with being_made(self.name):
                device = self.device_class(**self.arguments)
        except ConfigError as error:
            if str(error).startswith(self.driver):
                raise
            kind = DeviceError if isinstance(error, DeviceError) else ConfigError
            raise kind(f"{self.driver}: {error}") from error
        except (OSError, ValueError) as error:
            raise DeviceError(f"{self.driver}: {error}") from error
        except Exception as error:
            raise self._bug(error, "__init__ raised ") from error
        try:
            return VirtioPci(
                device,
                ids=shown,
                vectors=self.common.vectors,
                name=self.name,
                offer=self.offer,
                unsealed_memory=self.common.unsealed_memory,
            )
        except BaseException as error:
            _close_half_made(device)
            if isinstance(error, Exception) and not isinstance(error, ConfigError):
                raise self._bug(error) from error
            raise

    def _bug(self, error: Exception, did: str = "") -> DeviceError:
        where = author_line(error)
        what = str(error) if isinstance(error, AuthorError) else f"{did}{type(error).__name__}: {error}"
        return DeviceError(f"{self.driver}: a bug in the device: {f'{where}: ' if where else ''}{what}")


def _close_half_made(device: Device) -> None:
    try:
        device.close()
    except Exception:  # its `close` needs what the mistake that is reported has prevented
        logger.debug("%s: close() of a device that could not be made", device.name, exc_info=True)


def find_class(driver: str) -> type[Device]:
    """The class for a device's name or virtio id, as the bus knows it, or for ``file.py:Class``. Raises ConfigError."""
    if is_device_file(driver):
        return load_device_class(driver)
    try:
        return bus.match(int(driver) if driver.isdecimal() else driver)
    except ConfigError:
        close = suggestion(driver, bus.names)
        known = ", ".join(bus.names)
        raise ConfigError(f'no device "{driver}"{close} (devices: {known}; or your own: file.py:Class)') from None


def shipped_classes() -> list[type[Device]]:
    """The device classes that come with the package, by name."""
    return [devices.load(name) for name in devices.SHIPPED]


def setups(specs: Iterable[DeviceSpec]) -> list[DeviceSetup]:
    """Find each device's class, convert its options, and give it a name. Raises ConfigError."""
    parsed = [_parse(spec) for spec in specs]
    taken = {common.id for _, _, _, common, _ in parsed if common.id is not None}
    counted: Counter[str] = Counter()
    found = []
    for driver, device_class, arguments, common, offer in parsed:
        name = common.id or _free_name(device_class.name, counted, taken)
        found.append(DeviceSetup(name, driver, device_class, arguments, common, offer))
    _refuse_duplicates("id", [setup.name for setup in found])
    _refuse_duplicates("socket", [str(setup.common.socket) for setup in found if setup.common.socket])
    return found


def _parse(spec: DeviceSpec) -> tuple[str, type[Device], dict[str, Any], CommonOptions, Offer]:
    label = spec.driver
    device_class = find_class(label)
    own, common, offered = class_options(device_class), common_options(), offer_options()
    given: list[dict[str, object]] = [{}, {}, {}]
    for key, value in spec.options.items():
        # A device's own option hides one that every device has.
        belongs_to = 1 if spelled(key) in common else 2 if spelled(key) in offered else 0
        given[0 if spelled(key) in own else belongs_to][key] = value
    arguments = convert_options(own, given[0], label=label, also=[*common, *offered])
    chosen = CommonOptions(**convert_options(common, given[1], label=label))
    if chosen.id is not None and not _ID.fullmatch(chosen.id):
        raise ConfigError(f"{label}: id={chosen.id}: expected a letter, then letters, digits, '-', '.' or '_'")
    if chosen.vectors is not None and not 0 <= chosen.vectors <= 2048:
        raise ConfigError(f"{label}: vectors={chosen.vectors}: expected 0 to 2048 (the limit of MSI-X)")
    try:
        offer = Offer(**convert_options(offered, given[2], label=label))
    except ConfigError as error:
        raise ConfigError(f"{label}: {str(error).removeprefix(f'{label}: ')}") from None
    return label, device_class, arguments, chosen, offer


def _free_name(kind: str, counted: Counter[str], taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", kind)
    while True:
        name = f"{stem}{counted[stem]}"
        counted[stem] += 1
        if name not in taken:
            return name


def _refuse_duplicates(option: str, values: Sequence[str]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ConfigError(f"{count} devices have {option}={value}: each needs one of its own")
