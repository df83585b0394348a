"""Set-up of a device from its description: a class, its arguments, a name and an identity.

A long file, since one record, `DeviceSetup`, is filled from each kind of description, and makes each kind of device.
"""

import inspect
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import trio

from vfiouser_virtio import devices
from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import being_made
from vfiouser_virtio.errors import AuthorError, ConfigError, DeviceError
from vfiouser_virtio.faults.fault_spec import FaultSpec
from vfiouser_virtio.memory import UnsealedMemory
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.serving.device_kinds import device_of
from vfiouser_virtio.serving.device_specs import DeviceSpec, is_device_file
from vfiouser_virtio.serving.guest_slots import GuestSlot, guest_slot, with_functions
from vfiouser_virtio.serving.options import Option, class_options, convert_options, options_of, spelled, suggestion
from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.virtio import Device, Offer, bus
from vfiouser_virtio.virtio.author_line import author_line, definition
from vfiouser_virtio.virtio.device_checks import close_device
from vfiouser_virtio.virtio.options import Making

if TYPE_CHECKING:
    from vfiouser_virtio.audit import AuditLog
    from vfiouser_virtio.pci.device import PciDevice
    from vfiouser_virtio.serving.device_kinds import AnyDevice, AnyFunction
    from vfiouser_virtio.serving.fault_options import DeviceFaults
    from vfiouser_virtio.serving.pci_options import PciDeviceOptions
    from vfiouser_virtio.transports.pci_device import PciDeviceFunction
    from vfiouser_virtio.virtio import Limits

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
# Options of `CommonOptions` that only virtio devices have.
_OF_VIRTIO = {"ids", "vectors", "fault", "fault_seed", "fault_log", "fault_control", "fault_stopped"}
# Seconds after which it is said what is being waited for.
_SAY_AFTER_S = 1.0
# QEMU's rule for ids (id_wellformed() in its util/id.c).
_ID = r"[A-Za-z][A-Za-z0-9._-]*"


class CommonOptions(NamedTuple):
    """Options that every device has, whatever its class: its socket, its name, its identity on the PCI bus."""

    id: Annotated[str | None, "name in log lines and QEMU arguments; default: blk0, blk1, rng0, …"] = None
    socket: Annotated[Path | None, "listen on this path; default: one in a new private folder"] = None
    addr: Annotated[
        str | None,
        "place on the guest's PCI bus for QEMU: SLOT or SLOT.FUNCTION, in hex; functions of one slot are one device",
    ] = None
    bus: Annotated[str | None, "QEMU's id of the bus that addr is on, such as that of a pcie-root-port"] = None
    ids: Annotated[Style | None, "identity on the PCI bus; default: that of --ids"] = None
    vectors: Annotated[int | None, "MSI-X vectors; 0 leaves INTx only; default: one per queue, and one"] = None
    vendor_id: Annotated[int | None, "PCI vendor, 16 bits; default: as ids says, also for the next ones"] = None
    device_id: Annotated[int | None, "PCI device, 16 bits"] = None
    subsystem_vendor_id: Annotated[int | None, "PCI subsystem vendor, 16 bits"] = None
    subsystem_id: Annotated[int | None, "PCI subsystem, 16 bits"] = None
    class_code: Annotated[int | None, "PCI class code, 24 bits"] = None
    revision: Annotated[int | None, "PCI revision, 8 bits; a modern virtio device has at least 1"] = None
    fault: Annotated[
        Sequence[FaultSpec],
        "what the device does wrong on purpose, to test its driver: NAME[:KEY=VALUE]…, profile:NAME or replay:FILE; "
        "`vfiouser-virtio list-faults` shows all (docs/evil.md)",
    ] = ()
    fault_seed: Annotated[int | None, "decides where faults happen; default: another one each time, see fault-log"] = (
        None
    )
    fault_log: Annotated[Path | None, "write what faults have done, and when, to this file: JSON lines"] = None
    fault_control: Annotated[
        Path | None, "FIFO that takes lines while faults run: stop, start, stop NAME, start NAME, status; see mkfifo(1)"
    ] = None
    fault_stopped: Annotated[bool, "no fault happens until a line in fault-control says start"] = False
    unsealed_memory: Annotated[
        UnsealedMemory,
        "guest memory whose file can become shorter under us, which would kill this process (anything but a sealed "
        "memfd): map it (fast), copy from and to it (safe and slow), or refuse it; auto: map it for clients of our own "
        "user, copy it for others",
    ] = "auto"

    @property
    def is_faulty(self) -> bool:
        """Whether the device is asked for faults, or for something that only these have."""
        log_or_control = (self.fault_log, self.fault_seed, self.fault_control, self.fault_stopped or None)
        return bool(self.fault) or any(value is not None for value in log_or_control)


def _of_disks(faults: Sequence[FaultSpec]) -> bool:
    from vfiouser_virtio.faults import FaultPlan, Place  # only here: see `fault_spec`

    return FaultPlan(faults).has(Place.BLK)


def common_options() -> Mapping[str, Option]:
    """The table of `CommonOptions`."""
    return options_of(CommonOptions.__new__)


def offer_options() -> Mapping[str, Option]:
    """The table of `Offer`: what the driver of any device may choose from."""
    return options_of(Offer.__init__)


def limit_options() -> Mapping[str, Option]:
    """The table of `Limits`: how much any device does at most."""
    from vfiouser_virtio.virtio import Limits  # only here: few devices have any

    return options_of(Limits.__init__)


def pci_common_options() -> Mapping[str, Option]:
    """The table of those `CommonOptions` that a PCI device of an author's own has."""
    return {name: option for name, option in common_options().items() if option.parameter not in _OF_VIRTIO}


def pci_options() -> Mapping[str, Option]:
    """The table of `pci_options.PciDeviceOptions`."""
    from vfiouser_virtio.serving.pci_options import PciDeviceOptions  # only here: see `device_kinds`

    return options_of(PciDeviceOptions.__init__)


class DeviceSetup(NamedTuple):
    """Device that can be made: all of its options are known and converted."""

    name: str
    """Unique among the devices of a process: blk0."""
    driver: str
    """As the user named its type."""
    device_class: "type[AnyDevice]"
    arguments: dict[str, Any]
    common: CommonOptions
    offer: Offer
    limits: "Limits | None" = None
    own: "PciDeviceOptions | None" = None
    """Of a PCI device of an author's own."""
    place: GuestSlot = GuestSlot()
    """Of ``addr`` and ``bus``, those of the other devices considered."""
    made: "AnyDevice | AnyFunction | None" = None
    """What a program has made itself, instead of ``arguments``."""

    @property
    def may_wait(self) -> bool:
        """Whether the device is to be made in a thread: see `Device.made_in_thread`."""
        by = self.device_class.made_in_thread
        return self.made is None and (by if isinstance(by, bool) else not by.isdisjoint(self.arguments))

    def identity(self, style: Style = "default") -> Identity:
        """What it shows in PCI config space: ``style``, or the device's own, and single fields changed after that."""
        chosen = {field: getattr(self.common, option) for option, field in _IDENTITY_FIELDS.items()}
        changes = {field: value for field, value in chosen.items() if value is not None}
        try:
            base = self._identity(style)
            return replace(base, **changes)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def _identity(self, style: Style) -> Identity:
        if issubclass(self.device_class, Device):
            return identity(self.device_class.device_id, self.common.ids or style)
        return self.device_class.identity

    def create(
        self,
        style: Style = "default",
        audit: "AuditLog | None" = None,
        make_function: Callable[..., VirtioPci] | None = None,
    ) -> "AnyFunction":
        """The device on a PCI function of its own; both are made, unless a program has. ``audit`` is as with `serve`,
        and ``make_function`` as with `serving_on`.

        Raises ConfigError for values that clash, DeviceError for what cannot be had, and for mistakes of the device's
        author: with the line of the author's code.
        """
        return self.attach(self.made or self.make(), style, audit, make_function)

    def attach(
        self,
        device: "AnyDevice | AnyFunction",
        style: Style = "default",
        audit: "AuditLog | None" = None,
        make_function: Callable[..., VirtioPci] | None = None,
    ) -> "AnyFunction":
        """The second half of `create`: ``device`` on its PCI function; it is closed where that cannot be."""
        if not isinstance(device, Device | VirtioPci):
            return self._attach_own(device, audit)
        if isinstance(device, VirtioPci):
            if audit is not None:
                raise ConfigError(f"{self.name}: audit: it is a VirtioPci already; make it an AuditedVirtioPci")
            return device
        faults: DeviceFaults | None = None
        try:
            if self.common.is_faulty or audit is not None:
                faults = self._faults()
            made = (make_function or (VirtioPci if faults is None else faults.function(audit)))(
                device,
                ids=self.identity(style),
                vectors=self.common.vectors,
                name=self.name,
                offer=self.offer,
                limits=self.limits,
                unsealed_memory=self.common.unsealed_memory,
            )
            if faults is not None:
                faults.open_log()
            return made
        except BaseException as error:
            if faults is not None:
                faults.close()
            if self.made is None:
                _close_half_made(device)
            if isinstance(error, Exception) and not isinstance(error, ConfigError):
                raise self._bug(error) from error
            raise

    def _faults(self) -> "DeviceFaults":
        from vfiouser_virtio.serving.fault_options import DeviceFaults  # only here: see `fault_spec`

        return DeviceFaults(self.common, self.name)

    def _attach_own(self, device: "PciDevice | PciDeviceFunction", audit: "AuditLog | None") -> "PciDeviceFunction":
        """`attach` of a PCI device of an author's own."""
        from vfiouser_virtio.serving.fault_log import burndown_log  # only here: see `device_kinds`
        from vfiouser_virtio.serving.pci_options import PciDeviceOptions
        from vfiouser_virtio.transports.pci_device import PciDeviceFunction

        own = self.own or PciDeviceOptions()
        try:
            if audit is not None:
                raise ConfigError(f"{self.name}: --audit is of virtio drivers, and this is no virtio device")
            if isinstance(device, PciDeviceFunction):
                return device
            return PciDeviceFunction(
                device,
                identity=self.identity(),
                name=self.name,
                unsealed_memory=self.common.unsealed_memory,
                unmodelled=own.unmodelled,
                spin=own.spin,
                burndown=None if own.burndown is None else burndown_log(own.burndown),
            )
        except BaseException as error:
            if self.made is None and not isinstance(device, PciDeviceFunction):
                _close_half_made(device)
            if isinstance(error, Exception) and not isinstance(error, ConfigError):
                raise self._bug(error) from error
            raise

    def make(self) -> "AnyDevice":
        """The first half of `create`: the device of ``arguments``. Raises as that."""
        try:
            with being_made(self.name):
                return self._construct()
        except ConfigError as error:
            if str(error).startswith(self.driver):
                raise
            kind = DeviceError if isinstance(error, DeviceError) else ConfigError
            raise kind(f"{self.driver}: {error}") from error
        except (OSError, ValueError) as error:
            raise DeviceError(f"{self.driver}: {error}") from error
        except Exception as error:
            raise self._bug(error, "__init__ raised ") from error

    def _construct(self) -> "AnyDevice":
        wrapper: dict[str, Any] = {}
        if self.common.fault and _of_disks(self.common.fault):
            from vfiouser_virtio.faults.disk import FaultyDisk  # only here, as above

            if "wrap_backend" not in inspect.signature(self.device_class.__init__).parameters:
                raise ConfigError("a fault of disks needs a disk: blk")
            wrapper["wrap_backend"] = FaultyDisk
        made = {name: value() for name, value in self.arguments.items() if isinstance(value, Making)}
        try:
            return self.device_class(**{**self.arguments, **made, **wrapper})
        except BaseException:
            for each in made.values():
                each.close()
            raise

    def _bug(self, error: Exception, did: str = "") -> DeviceError:
        where = author_line(error)
        what = str(error) if isinstance(error, AuthorError) else f"{did}{type(error).__name__}: {error}"
        if not where and isinstance(error, AuthorError) and (class_line := definition(self.device_class)) not in what:
            where = class_line
        return DeviceError(f"{self.driver}: a bug in the device: {f'{where}: ' if where else ''}{what}")


async def made_in_thread(setup: DeviceSetup) -> "AnyDevice":
    """`DeviceSetup.make`, in a thread: what ``__init__`` opens may lie on a file system that hangs.

    Cancelled, it closes the device when that has been made after all.
    """
    from vfiouser_virtio.serving.own_thread import in_own_thread  # only here: devices in RAM open nothing

    made: list[AnyDevice] = []
    given_up = False
    lock = threading.Lock()

    def make() -> None:
        device = setup.make()
        with lock:
            if not given_up:
                made.append(device)
                return
        close_device(device, setup.name)

    async def say_what_takes_so_long() -> None:
        await trio.sleep(_SAY_AFTER_S)
        logger.warning("%s: to make it takes long: a file system of the host is slow, or hangs", setup.name)

    async with background() as tasks:
        tasks.start_soon(say_what_takes_so_long)
        try:
            await in_own_thread(make)
        except trio.Cancelled:
            with lock:
                given_up = True
            for device in made:
                close_device(device, setup.name)
            raise
    return made[0]


def _close_half_made(device: "AnyDevice") -> None:
    try:
        device.close()
    except Exception:  # its `close` needs what the mistake that is reported has prevented
        logger.debug("%s: close() of a device that could not be made", device.name, exc_info=True)


def find_class(driver: str) -> "type[AnyDevice]":
    """The class for a device's name or virtio id, as the bus knows it, or for ``file.py:Class``. Raises ConfigError."""
    if is_device_file(driver):
        from vfiouser_virtio.serving.device_files import load_device_class  # only here: most devices are the package's

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


def setups(devices: "Iterable[DeviceSpec | AnyDevice | AnyFunction]") -> list[DeviceSetup]:
    """Find each device's class, convert its options, and give it a name. Raises ConfigError."""
    found = [_described(each) if isinstance(each, DeviceSpec) else _given(each) for each in devices]
    taken = {setup.name for setup in found}
    counted: Counter[str] = Counter()
    found = [
        setup if setup.name else setup._replace(name=_free_name(setup.device_class.name, counted, taken))
        for setup in found
    ]
    _refuse_duplicates("id", [setup.name for setup in found])
    _refuse_duplicates("socket", [str(setup.common.socket) for setup in found if setup.common.socket])
    _refuse_shared("fault-log", [setup.common.fault_log for setup in found])
    _refuse_shared("burndown", [setup.own and setup.own.burndown for setup in found])
    making = [each for setup in found for each in setup.arguments.values() if isinstance(each, Making)]
    _refuse_shared("dump", [each.arguments.get("dump") for each in making])
    places = with_functions((setup.name, _place(setup)) for setup in found)
    return [setup._replace(place=place) for setup, place in zip(found, places, strict=True)]


def _place(setup: DeviceSetup) -> GuestSlot:
    try:
        return guest_slot(setup.common.addr, setup.common.bus)
    except ConfigError as error:
        raise ConfigError(f"{setup.name}: {error}") from None


def _given(made: "AnyDevice | AnyFunction") -> DeviceSetup:
    device, name, offer = device_of(made), "", Offer()
    if isinstance(made, VirtioPci):
        name, offer = made.core.name, made.core.offer
    elif device is not made:
        name = made.name
    return DeviceSetup(name, type(device).__name__, type(device), {}, CommonOptions(), offer, made=made)


def _described(spec: DeviceSpec) -> DeviceSetup:
    """The device of a description; its name is empty where the user has given none."""
    label = spec.driver
    device_class = spec.device_class or find_class(label)
    # A device's own option hides one that every device has.
    if not issubclass(device_class, Device):
        return _described_own(label, device_class, spec)
    own = class_options(device_class)
    common: Mapping[str, Option] = {}
    limited: Mapping[str, Option] = {}
    offered: Mapping[str, Option] = {}
    # Only as far as they are needed: to read a table takes half a millisecond.
    if any(spelled(key) not in own for key in spec.options):
        common = common_options()
        if any(spelled(key) not in own and spelled(key) not in common for key in spec.options):
            limited, offered = limit_options(), offer_options()
    tables = own, common, limited, offered
    given: list[dict[str, object]] = [{} for _ in tables]
    for key, value in spec.options.items():
        belongs_to = next((number for number, table in enumerate(tables) if spelled(key) in table), 0)
        given[belongs_to][key] = value
    arguments = convert_options(own, given[0], label=label, also=[*common, *limited, *offered])
    chosen = _common(common, given[1], label)
    if chosen.vectors is not None and not 0 <= chosen.vectors <= 2048:
        raise ConfigError(f"{label}: vectors={chosen.vectors}: expected 0 to 2048 (the limit of MSI-X)")
    try:
        offer = Offer(**convert_options(offered, given[3], label=label))
        limits = _limits(convert_options(limited, given[2], label=label)) if given[2] else None
    except ConfigError as error:
        raise ConfigError(f"{label}: {str(error).removeprefix(f'{label}: ')}") from None
    return DeviceSetup(chosen.id or "", label, device_class, arguments, chosen, offer, limits)


def _limits(arguments: dict[str, Any]) -> "Limits":
    from vfiouser_virtio.virtio import Limits  # only here: few devices have any

    return Limits(**arguments)


def _common(common: Mapping[str, Option], given: Mapping[str, object], label: str) -> CommonOptions:
    chosen = CommonOptions(**convert_options(common, given, label=label))
    if chosen.id is not None and not re.fullmatch(_ID, chosen.id):
        raise ConfigError(f"{label}: id={chosen.id}: expected a letter, then letters, digits, '-', '.' or '_'")
    return chosen


def _described_own(label: str, device_class: "type[PciDevice]", spec: DeviceSpec) -> DeviceSetup:
    """`_described` of a PCI device of an author's own, which has no options of virtio."""
    from vfiouser_virtio.serving.pci_options import PciDeviceOptions  # only here: see `device_kinds`

    own = class_options(device_class)
    common, watched = pci_common_options(), pci_options()
    tables = own, common, watched
    given: list[dict[str, object]] = [{} for _ in tables]
    for key, value in spec.options.items():
        given[next((number for number, table in enumerate(tables) if spelled(key) in table), 0)][key] = value
    arguments = convert_options(own, given[0], label=label, also=[*common, *watched])
    chosen = _common(common, given[1], label)
    options = PciDeviceOptions(**convert_options(watched, given[2], label=label))
    if options.spin < 0:
        raise ConfigError(f"{label}: spin={options.spin}: expected a number of reads, or 0")
    return DeviceSetup(chosen.id or "", label, device_class, arguments, chosen, Offer(), own=options)


def _free_name(kind: str, counted: Counter[str], taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", kind)
    while True:
        name = f"{stem}{counted[stem]}"
        counted[stem] += 1
        if name not in taken:
            return name


def _refuse_shared(option: str, files: Iterable[object]) -> None:
    """Two that write to one file write over each other. Of what is no file, such as /dev/null, all may have it."""
    real = [os.path.realpath(file) for file in files if isinstance(file, Path)]
    _refuse_duplicates(option, [file for file in real if os.path.isfile(file) or not os.path.exists(file)])


def _refuse_duplicates(option: str, values: Sequence[str]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ConfigError(f"{count} devices have {option}={value}: each needs one of its own")
