"""Several devices served by one process, each on a socket of its own: what `serve` and `run` do, and tests.

`processes` does the same with a process for each.

::

    async with serving(["blk,path=disk.img", "rng"]) as served:
        for endpoint in served.endpoints:
            print(endpoint.name, endpoint.socket_path)
        await served.finished.wait()
"""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import trio

from vfiouser_virtio.engines import Engine, EngineName, Socket
from vfiouser_virtio.engines import engine as choose_engine
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.device_setup import DeviceSetup, setups
from vfiouser_virtio.serving.device_specs import DeviceSpec, parse_device
from vfiouser_virtio.serving.qemu_command import QemuDevice, qemu_device
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.vfio_user import ListenError, OpenTrace, from_systemd

Place = str | int
"""Where a device is served: a path for its socket, or an inherited file descriptor."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One device on its socket."""

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

    @property
    def qemu_device(self) -> QemuDevice | None:
        """QEMU's ``-device`` argument, as a mapping; None where there is no path."""
        return None if self.socket_path is None else qemu_device(self.name, self.socket_path)


@runtime_checkable
class _Described(Protocol):
    """A device that can say where its host side is."""

    def describe(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """What `serving` serves."""

    endpoints: Sequence[Endpoint]
    finished: trio.Event
    """No client will come any more: set only with ``once``, or where all sockets were connections already."""
    functions: Sequence[VirtioPci] = ()
    """Those of this process, in the order of ``endpoints``."""

    @property
    def qemu_devices(self) -> list[QemuDevice]:
        """QEMU's ``-device`` arguments, as mappings."""
        return [device for endpoint in self.endpoints if (device := endpoint.qemu_device) is not None]


@asynccontextmanager
async def serving(
    devices: Iterable[str | DeviceSpec],
    *,
    places: Sequence[Place] = (),
    ids: Style = "default",
    write_multiple: bool = False,
    once: bool = False,
    engine: EngineName = "vfio-user",
    libvfio_user: str | None = None,
    open_trace: OpenTrace | None = None,
    abandoned: list[Callable[[], None]] | None = None,
) -> AsyncIterator[Serving]:
    """Serve devices for as long as the block runs; when it is entered, clients can connect.

    ``places`` are the sockets of those devices that have no ``socket`` option, in order; after them come systemd's, and
    the rest get sockets in a new private folder. With ``once``, each device serves one client and no other.
    ``engine``, ``libvfio_user``, the file of its library, and ``open_trace`` are as with `engines.engine`.
    ``abandoned`` gets what removes the sockets where the block can come to no end, for `run_until_signal`.
    Raises ConfigError, DeviceError when a device cannot be made, ListenError when a socket cannot be had.
    """
    wanted = parsed(devices)
    chosen = choose_engine(engine, libvfio_user=libvfio_user, write_multiple=write_multiple, open_trace=open_trace)
    with ExitStack() as stack:
        listeners = listen(wanted, places, chosen, stack)
        if abandoned is not None:
            abandoned.append(stack.close)
        async with serving_on(listeners, wanted, chosen, ids=ids, once=once) as served:
            yield served


@asynccontextmanager
async def serving_on(
    listeners: Sequence[Socket], wanted: Sequence[DeviceSetup], engine: Engine, *, ids: Style, once: bool
) -> AsyncIterator[Serving]:
    """Make the devices, and serve each on its socket for as long as the block runs. The rest is as with `serving`."""
    # First the sockets: what waits for one to appear can connect while a device is still being made.
    for listener in listeners:
        engine.open(listener)
    functions = _create(wanted, ids)
    endpoints = [
        endpoint_of(setup, listener, host_side(function))
        for setup, listener, function in zip(wanted, listeners, functions, strict=True)
    ]
    served = Serving(endpoints, trio.Event(), functions)
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function.serve)
        nursery.start_soon(partial(_serve_sockets, served, listeners, engine, once=once))
        try:
            yield served
        except BaseException as error:
            # Raised again below: the caller wants the error itself, not the group that a nursery would make of it.
            raised = error
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


def parsed(devices: Iterable[str | DeviceSpec]) -> list[DeviceSetup]:
    """The devices with all of their options known and converted. Raises ConfigError."""
    return setups(parse_device(device) if isinstance(device, str) else device for device in devices)


def endpoint_of(setup: DeviceSetup, listener: Socket, host_side: str = "") -> Endpoint:
    """What there is to say of a device and its socket."""
    return Endpoint(setup.name, setup.driver, listener.where, listener.path, host_side)


def host_side(function: VirtioPci) -> str:
    """Where the function's device is to be found on the host; empty where that says nothing new."""
    return function.device.describe() if isinstance(function.device, _Described) else ""


async def _serve_sockets(served: Serving, listeners: Sequence[Socket], engine: Engine, *, once: bool) -> None:
    async with trio.open_nursery() as nursery:
        for endpoint, function, listener in zip(served.endpoints, served.functions, listeners, strict=True):
            nursery.start_soon(partial(engine.serve, function, listener, name=endpoint.name, once=once))
    served.finished.set()


def _create(wanted: Sequence[DeviceSetup], ids: Style) -> list[VirtioPci]:
    """Make all devices, or none: what has been opened is closed again when one cannot be made."""
    functions: list[VirtioPci] = []
    try:
        functions.extend(setup.create(ids) for setup in wanted)
    except BaseException:
        for function in functions:
            function.device.close()
        raise
    return functions


def listen(wanted: Sequence[DeviceSetup], places: Sequence[Place], engine: Engine, stack: ExitStack) -> list[Socket]:
    """A socket for each device. All are registered with ``stack`` at once, so that none outlives an error."""
    for setup in wanted:
        if setup.offer.iommu_platform and not engine.behind_iommu:
            raise ConfigError(f"{setup.name}: iommu-platform=on: not with libvfio-user; use --engine vfio-user")
        if setup.common.unsealed_memory in ("copy", "refuse") and not engine.knows_files:
            what = f"{setup.name}: unsealed-memory={setup.common.unsealed_memory}"
            raise ConfigError(f"{what}: libvfio-user maps all memory itself; use --engine vfio-user")
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
            folder = folder or _private_folder(stack)
            listener = engine.listen(f"{folder}/{setup.name}.sock")
        stack.enter_context(listener)
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
        folder.rmdir()
    except OSError:
        pass  # somebody has put something there, or has removed it
