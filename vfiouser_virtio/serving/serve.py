"""Devices served by one process, each on a socket of its own, for as long as a block runs.

::

    async with serve(Pattern(), path="/run/vm/pattern.sock") as serving:
        print(serving.qemu_command)
        await serving.wait_finished()

`processes` does the same with a process for each.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    nullcontext,
)
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.engines import Engine, EngineName, Socket
from vfiouser_virtio.engines import engine as choose_engine
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.removal import remove_folder
from vfiouser_virtio.serving.device_kinds import device_of
from vfiouser_virtio.serving.device_setup import DeviceSetup, made_in_thread, setups
from vfiouser_virtio.serving.device_specs import DeviceSpec, parse_device
from vfiouser_virtio.serving.guest_slots import GuestSlot
from vfiouser_virtio.serving.qemu_command import QemuDevice, qemu_arguments, qemu_device, shell_lines
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.vfio_user import ListenError, Message, OpenTrace, from_systemd
from vfiouser_virtio.virtio import Device
from vfiouser_virtio.virtio.device_checks import close_device

if TYPE_CHECKING:
    from vfiouser_virtio.audit.findings import AuditLog
    from vfiouser_virtio.serving.device_kinds import AnyDevice, AnyFunction
    from vfiouser_virtio.serving.sandbox import Sandbox

Place = str | int
"""Where a device is served: a path for its socket, or an inherited file descriptor."""


class Endpoint(NamedTuple):
    """Device on its socket."""

    name: str
    """blk0: unique among those that are served together."""
    driver: str
    """As the user named its type."""
    where: str
    """``socket_path``, or ``fd:3``."""
    socket_path: str | None
    """The absolute path that clients connect to; None for a socket without one, or that is connected already."""
    host_side: str
    """Where the device is to be found on the host (`pty /dev/pts/3`); empty where that says nothing new."""
    place: GuestSlot = GuestSlot()
    """Where it is on the guest's PCI bus, as far as the user has said."""

    @property
    def qemu_device(self) -> QemuDevice | None:
        """QEMU's ``-device`` argument, as a mapping; None where there is no path."""
        return None if self.socket_path is None else qemu_device(self.name, self.socket_path, self.place)


@runtime_checkable
class _Described(Protocol):
    """A device that can say where its host side is."""

    def describe(self) -> str: ...


class Serving(NamedTuple):
    """Served devices: the result of `serve`."""

    endpoints: Sequence[Endpoint]
    """One for each device, in their order."""
    finished: trio.Event
    """No client will come any more: set only with ``once``, or where all sockets were connections already."""
    functions: "Sequence[AnyFunction]" = ()
    """Those of this process, in the order of ``endpoints``; none where each device has a process of its own."""

    @property
    def qemu_devices(self) -> list[QemuDevice]:
        """QEMU's ``-device`` arguments, as mappings; `vm.boot_guest` takes them."""
        return [device for endpoint in self.endpoints if (device := endpoint.qemu_device) is not None]

    @property
    def qemu_command(self) -> str:
        """QEMU's command line for a shell, without the guest's own options; empty where no socket has a path."""
        devices = self.qemu_devices
        return shell_lines("qemu-system-x86_64", qemu_arguments(devices)) if devices else ""

    async def wait_finished(self) -> None:
        """Wait until no client will come any more: see ``finished``. Without ``once`` that is for ever."""
        await self.finished.wait()


@asynccontextmanager
async def serve(
    *devices: "str | DeviceSpec | AnyDevice | AnyFunction",
    path: str | os.PathLike[str] | None = None,
    places: Sequence[Place] = (),
    ids: Style = "default",
    write_multiple: bool = False,
    once: bool = False,
    engine: EngineName | Engine = "vfio-user",
    libvfio_user: str | None = None,
    open_trace: OpenTrace | None = None,
    abandoned: list[Callable[[], None]] | None = None,
    audit: "AuditLog | None" = None,
    sandbox: "Sandbox | None" = None,
    allow_uids: Collection[int] | None = None,
) -> AsyncIterator[Serving]:
    """Serve devices on vfio-user sockets for as long as the block runs; when it is entered, clients can connect.

    A device is an object of a `Device` class, a `VirtioPci` that has one (with the vectors, identity and offered
    features of your choice), or a description as ``--device`` takes it (``blk,path=disk.img``). Objects are taken over:
    their `Device.close` is called in the end, also where an error prevents that they are served.

    ``path`` is the socket of the only device. ``places`` are the sockets, or inherited file descriptors, of those
    devices that have no ``socket`` option, in order; after them come systemd's (sd_listen_fds(3)), and the rest get
    sockets in a new private folder. A socket has one client at a time; with ``once``, each device serves one client and
    no other. ``ids`` is the identity on the PCI bus. ``engine`` speaks the protocol; ``libvfio_user``, the file of its
    library, ``write_multiple`` and ``open_trace`` are as with `engines.engine`, and none of them for an engine object.
    ``audit`` gets what the devices' drivers do against the rules of virtio 1.4 (see `vfiouser_virtio.audit`); not for
    a `VirtioPci`, which may be an `AuditedVirtioPci` of your own.
    With a ``sandbox`` the process gives up, once its devices are made, all rights that they do not need: for good, also
    after the block. It must have no other thread then.
    Clients of other users than ``allow_uids`` are refused; None: all are served who may open the socket.
    ``abandoned`` gets what removes the sockets where the block can come to no end, for `run_until_signal`.

    Raises ConfigError, DeviceError when a device cannot be made, ListenError when a socket cannot be had. An exception
    of the block comes out as it is.
    """
    with ExitStack() as stack, ExitStack() as unserved:
        for device in devices:
            if not isinstance(device, str | DeviceSpec):
                owned = device_of(device)
                unserved.callback(close_device, owned, owned.name)
        if path is not None:
            if places or len(devices) != 1:
                raise ConfigError("serve: path is the socket of a single device; use places for several")
            places = [os.fspath(path)]
        wanted = parsed(devices)
        tell_types(wanted, open_trace)
        chosen = choose_engine(engine, libvfio_user=libvfio_user, write_multiple=write_multiple, open_trace=open_trace)
        if sandbox is not None:
            sandbox.check(chosen)
            stack.callback(sandbox.end)
        made: list[Path] = []
        listeners = listen(wanted, places, chosen, stack, made, allow_uids=allow_uids)
        if sandbox is not None:
            sandbox.own(listeners, made)
            sandbox = sandbox.with_access(HostAccess(removes_folders=tuple(made)))
        if abandoned is not None:
            abandoned.append(stack.close)
        async with serving_on(listeners, wanted, chosen, ids=ids, once=once, audit=audit, sandbox=sandbox) as served:
            unserved.pop_all()  # `VirtioPci.serve` closes them
            yield served


def serve_in_one(
    *devices: "str | DeviceSpec | AnyDevice | AnyFunction", **options: Any
) -> AbstractContextManager[AbstractAsyncContextManager[Serving]]:
    """`serve` in the form of `processes.serve_in_processes`: what is entered before ``trio.run`` does nothing."""
    return nullcontext(serve(*devices, **options))


@asynccontextmanager
async def serving_on(
    listeners: Sequence[Socket],
    wanted: Sequence[DeviceSetup],
    engine: Engine,
    *,
    ids: Style,
    once: bool,
    audit: "AuditLog | None" = None,
    make_function: Callable[..., VirtioPci] | None = None,
    sandbox: "Sandbox | None" = None,
) -> AsyncIterator[Serving]:
    """Make the devices, and serve each on its socket for as long as the block runs.

    ``make_function`` makes each function, instead of what the description says. The rest is as with `serve`.
    """
    # First the sockets: what waits for one to appear can connect while a device is still being made.
    for listener in listeners:
        engine.open(listener)
    functions = await _create(wanted, ids, audit, make_function)
    if sandbox is not None:
        try:
            await sandbox.enter([function.device for function in functions], listeners)
        except BaseException:
            _close_made(wanted, functions)
            raise
    endpoints = [
        endpoint_of(setup, listener, host_side(function))
        for setup, listener, function in zip(wanted, listeners, functions, strict=True)
    ]
    served = Serving(endpoints, trio.Event(), functions)
    async with background() as tasks:
        for function in functions:
            tasks.start_soon(function.serve)
        if not all(isinstance(function, VirtioPci) for function in functions):
            from vfiouser_virtio.serving.pci_options import report_on_signal  # only here: see `device_kinds`

            tasks.start_soon(report_on_signal, functions)
        tasks.start_soon(partial(_serve_sockets, served, listeners, engine, once=once))
        yield served


def parsed(devices: "Iterable[str | DeviceSpec | AnyDevice | AnyFunction]") -> list[DeviceSetup]:
    """The devices with all of their options known and converted. Raises ConfigError."""
    return setups(parse_device(device) if isinstance(device, str) else device for device in devices)


@runtime_checkable
class _KnowsTypes(Protocol):
    """A trace that names the feature bits of devices, and registers: `trace.TraceLog`."""

    def know(self, device: str, feature_bits: type[IntEnum] | None) -> None: ...

    def know_registers(
        self, device: str, name_of: Callable[[int, int], str], words_of: Callable[[Message], list[str]]
    ) -> None: ...


def tell_types(wanted: Iterable[DeviceSetup], open_trace: object) -> None:
    """Tell the trace, if it cares, what the feature bits of each device are called."""
    if isinstance(open_trace, _KnowsTypes):
        for setup in wanted:
            if issubclass(setup.device_class, Device):
                open_trace.know(setup.name, setup.device_class.feature_bits)
            else:
                # Only here: see `device_kinds`.
                from vfiouser_virtio.serving.register_names import FieldWords, RegisterNames

                names = RegisterNames(setup.device_class)
                open_trace.know_registers(setup.name, names, FieldWords(names).names)


def endpoint_of(setup: DeviceSetup, listener: Socket, host_side: str = "") -> Endpoint:
    """What there is to say of a device and its socket."""
    return Endpoint(setup.name, setup.driver, listener.where, listener.path, host_side, setup.place)


def host_side(function: "AnyFunction") -> str:
    """Where the function's device is to be found on the host; empty where that says nothing new."""
    return function.device.describe() if isinstance(function.device, _Described) else ""


async def _serve_sockets(served: Serving, listeners: Sequence[Socket], engine: Engine, *, once: bool) -> None:
    async with trio.open_nursery() as nursery:
        for endpoint, function, listener in zip(served.endpoints, served.functions, listeners, strict=True):
            nursery.start_soon(partial(engine.serve, function, listener, name=endpoint.name, once=once))
    served.finished.set()


async def _create(
    wanted: Sequence[DeviceSetup],
    ids: Style,
    audit: "AuditLog | None",
    make_function: Callable[..., VirtioPci] | None,
) -> "list[AnyFunction]":
    """Make all devices, or none: what has been opened is closed again when one cannot be made.

    Yields after each: a hundred take longer than the watchdog gives one task.
    """
    functions: list[AnyFunction] = []
    try:
        for setup in wanted:
            if setup.may_wait:
                functions.append(setup.attach(await made_in_thread(setup), ids, audit, make_function))
            else:
                functions.append(setup.create(ids, audit, make_function))
                await trio.lowlevel.checkpoint()
    except BaseException:
        _close_made(wanted, functions)
        raise
    return functions


def _close_made(wanted: Sequence[DeviceSetup], functions: "Sequence[AnyFunction]") -> None:
    for setup, function in zip(wanted, functions, strict=False):
        if setup.made is None:
            function.device.close()


def listen(
    wanted: Sequence[DeviceSetup],
    places: Sequence[Place],
    engine: Engine,
    stack: ExitStack,
    made: list[Path] | None = None,
    *,
    allow_uids: Collection[int] | None = None,
) -> list[Socket]:
    """A socket for each device. All are registered with ``stack`` at once, so that none outlives an error.

    ``made`` gets the folder that was made for some, if any, which goes with the ``stack`` as well. Clients are of
    users in ``allow_uids``, unless that is None.
    """
    for setup in wanted:
        if setup.offer.iommu_platform and not engine.behind_iommu:
            raise ConfigError(f"{setup.name}: iommu-platform=on: not with libvfio-user; use --engine vfio-user")
    given = iter(places)
    systemd = iter(from_systemd())
    folder: Path | None = None
    listeners: list[Socket] = []
    for setup in wanted:
        place = setup.common.socket or next(given, None)
        inherited = None if place is not None else next(systemd, None)
        if inherited is not None:
            listener = engine.adopt(inherited)
        elif place is not None:
            listener = engine.listen(place)
        else:
            if folder is None:
                folder = _private_folder(stack)
                if made is not None:
                    made.append(folder)
            listener = engine.listen(f"{folder}/{setup.name}.sock")
        stack.enter_context(listener)
        if allow_uids is not None:
            listener.allow_only(allow_uids, setup.name)
        listeners.append(listener)
    if (left := len(list(given)) + len(list(systemd))) > 0:
        raise ConfigError(f"{left} more sockets than devices without a socket: give each --socket or --fd a device")
    return listeners


def _private_folder(stack: ExitStack) -> Path:
    """A new folder that only our user can enter, with a short path; removed in the end."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isabs(base) or not os.access(base, os.W_OK | os.X_OK):
        base = "/tmp"  # noqa: S108 - mkdtemp() makes a new folder of mode 0700 there
    try:
        folder = Path(tempfile.mkdtemp(prefix="vfiouser-virtio-", dir=base))
    except OSError as error:
        raise ListenError(f"no folder for sockets in {base}: {error.strerror}; say where with socket=PATH") from None
    stack.callback(_remove_empty, folder)
    return folder


def _remove_empty(folder: Path) -> None:
    try:
        remove_folder(folder)
    except OSError:
        pass  # something was put there, or it was removed
