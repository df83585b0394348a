"""``--processes``: each device in a process of its own, so that a busy one does not slow its neighbours.

::

    parent                                                     child: one for each device
    binds the sockets, forks ─────────────────────────────────▶ makes its device
    yields when all are made  ◀──── its host side, or a mistake  serves its socket
    is left, or killed ──────────── end of file ──────────────▶ ends in good order
    logs a death              ◀──── end of file ─────────────── has ended, or died
    has the hubs (`HubWire`)  ◀──── frames ───────────────────▶ has a network device

Forked rather than started anew: a child is ready after 8 ms instead of 180, and has 6 MB of its own instead of 20 (ten
entropy devices on two cores). What makes fork() dangerous is not there yet: it comes before ``trio.run``, when there is
neither another thread nor an event loop to inherit.
"""

import gc
import logging
import os
import signal
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.engines import Engine, EngineName, Socket
from vfiouser_virtio.engines import engine as choose_engine
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.groups import only
from vfiouser_virtio.serving.child_process import ChildProcess, Line
from vfiouser_virtio.serving.device_setup import DeviceSetup
from vfiouser_virtio.serving.device_specs import DeviceSpec
from vfiouser_virtio.serving.errors import ProcessError, StuckError
from vfiouser_virtio.serving.hub_wires import HubWire, close_wires, hub_wires, keep_only
from vfiouser_virtio.serving.keeper.keep import Supervision, engine_of_device, keep
from vfiouser_virtio.serving.serve import Endpoint, Place, Serving, endpoint_of, listen, parsed, serving_on, tell_types
from vfiouser_virtio.serving.signals import SIGNALS, EndVerdict, run_until_signal, signals_blocked
from vfiouser_virtio.serving.terminal import complain, flush
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.vfio_user import OpenTrace
from vfiouser_virtio.virtio import Device

if TYPE_CHECKING:
    from vfiouser_virtio.serving.sandbox import Sandbox

logger = logging.getLogger(__name__)

# What children may take to end before they are killed, in seconds; a server gives a device's last request 4 of them.
_TIMEOUT = 10.0


@contextmanager
def serve_in_processes(
    *devices: str | DeviceSpec,
    places: Sequence[Place] = (),
    ids: Style = "default",
    write_multiple: bool = False,
    once: bool = False,
    engine: EngineName = "vfio-user",
    libvfio_user: str | None = None,
    open_trace: OpenTrace | None = None,
    not_for_children: Sequence[int] = (),
    supervision: Supervision | None = None,
    sandbox: "Sandbox | None" = None,
    allow_uids: Collection[int] | None = None,
) -> Iterator[AbstractAsyncContextManager[Serving]]:
    """As `serve`, with a process for each device, in which the file descriptors ``not_for_children`` are closed.

    With ``supervision`` a process that dies is replaced by another one, which goes on where it was (`serving.keeper`).
    A ``sandbox`` is for those processes; this one, which has no client, keeps its rights, and so does a keeper.
    Clients of other users than ``allow_uids`` are refused, as with `serve`.

    To be entered before ``trio.run``, in which the result is entered in turn; that raises when a device cannot be made.
    One whose process dies later is logged and the others go on; in the end that raises ProcessError here.
    """
    wanted = parsed(devices)
    _refuse_shared_terminal(wanted)
    tell_types(wanted, open_trace)
    if supervision is not None:
        _check_supervised(wanted, engine)
    chosen = choose_engine(engine, libvfio_user=libvfio_user, write_multiple=write_multiple, open_trace=open_trace)
    if supervision is not None:
        chosen = engine_of_device(write_multiple=write_multiple, open_trace=open_trace)
    if sandbox is not None:
        sandbox.check(chosen)
    children: list[ChildProcess] = []
    died: list[str] = []
    with signals_blocked(), ExitStack() as stack:
        made: list[Path] = []
        listeners = listen(wanted, places, chosen, stack, made, allow_uids=allow_uids)
        if sandbox is not None:
            sandbox.own(listeners, made)
        wires = hub_wires(wanted)
        stack.callback(close_wires, wires)
        stack.callback(_end, children, [setup.name for setup in wanted], died)
        endpoints = [endpoint_of(setup, listener) for setup, listener in zip(wanted, listeners, strict=True)]

        def child(index: int, line: Line) -> int:
            for inherited in children:
                inherited.close()
            for fd in not_for_children:
                os.close(fd)
            keep_only(wires, index)
            for other in listeners:
                other.disown()
                if other is not listeners[index]:
                    other.close()
            if supervision is None:
                return _serve(wanted[index], listeners[index], chosen, line, ids=ids, once=once, sandbox=sandbox)
            return keep(
                wanted[index],
                listeners[index],
                line,
                partial(_serve, engine=chosen, ids=ids, sandbox=sandbox),
                once=once,
                supervision=supervision,
                traced=open_trace is not None,
            )

        for index, setup in enumerate(wanted):
            try:
                children.append(ChildProcess(partial(child, index)))
            except OSError as error:
                raise ConfigError(f"{setup.name}: no process for it: {error.strerror}") from None
        for listener in listeners:
            listener.stop_listening()  # a client of a child that has died is not to wait for us
        keep_only(wires, None)
        yield _supervised(endpoints, children, wires, died)
    if died:
        raise ProcessError(f"until this end, the process of {', '.join(died)} had died")


@asynccontextmanager
async def _supervised(
    endpoints: Sequence[Endpoint], children: Sequence[ChildProcess], wires: Sequence[HubWire], died: list[str]
) -> AsyncIterator[Serving]:
    # In the order of the devices: of several mistakes the same one is told as without processes.
    made = [await _made(endpoint, child) for endpoint, child in zip(endpoints, children, strict=True)]
    served = Serving(made, trio.Event())

    async def watch_all() -> None:
        async with trio.open_nursery() as nursery:
            for endpoint, child in zip(endpoints, children, strict=True):
                nursery.start_soon(_watch, endpoint.name, child, died)
        served.finished.set()

    async with background() as tasks:
        tasks.start_soon(watch_all)
        for wire in wires:
            tasks.start_soon(wire.run)
        yield served


async def _made(endpoint: Endpoint, child: ChildProcess) -> Endpoint:
    """The endpoint with its host side, once the device has been made. Raises what the user did wrong."""
    message = await child.receive()
    if isinstance(message, ConfigError):
        raise message
    if message is None:
        raise ProcessError(f"{endpoint.name}: its process {await child.wait_end() or 'ended'} before it was ready")
    return endpoint._replace(host_side=str(message))


async def _watch(name: str, child: ChildProcess, died: list[str]) -> None:
    log = DeviceLog(logger, name)  # whose lines are limited: a guest may have taken over the child
    while (mistake := await child.receive()) is not None:
        log.error("%s", mistake)
    if child.flooded:
        log.error("its process sends messages without end; they are not read any more")
    if death := await child.wait_end():
        logger.error("%s: its process %s; the device is gone", name, death)
        died.append(name)


def _end(children: Sequence[ChildProcess], names: Sequence[str], died: list[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    for child in children:
        child.tell_to_end()
    for name, child in zip(names, children, strict=False):  # not all of them have come to be
        if death := child.end(deadline):
            logger.error("%s: its process %s", name, death)
            died.append(name)


def _serve(
    setup: DeviceSetup,
    listener: Socket,
    engine: Engine,
    line: Line,
    *,
    ids: Style,
    once: bool,
    sandbox: "Sandbox | None",
    make_function: Callable[..., VirtioPci] | None = None,
    beside: Callable[[VirtioPci], Awaitable[None]] | None = None,
    finished: Callable[[], None] | None = None,
    signals: Sequence[signal.Signals] = SIGNALS,
) -> int:
    """What a child does, and ``beside`` it while the device is served; its exit status. These ``signals`` end it.

    ``finished`` is called once no client will come any more, so not for a signal.
    """
    with suppress(OSError):
        Path("/proc/self/comm").write_text(setup.name)  # for top and ps

    async def serve() -> int:
        async with (
            serving_on(
                [listener], [setup], engine, ids=ids, once=once, sandbox=sandbox, make_function=make_function
            ) as served,
            background() as tasks,
        ):
            flush()  # what the device has printed comes before the parent's lines
            gc.freeze()  # the device stays as long as its process: full collections need not go through it
            line.send(served.endpoints[0].host_side)
            tasks.start_soon(_end_with_parent, line, served.finished)
            if beside is not None:
                [function] = served.functions
                assert isinstance(function, VirtioPci)
                tasks.start_soon(beside, function)
            await served.finished.wait()
            verdict.give(0)
            if finished is not None:
                finished()
        return 0

    verdict = EndVerdict()
    try:
        # The parent hears of our end even where the kernel does not let us end.
        trio.run(partial(run_until_signal, serve, [line.hang_up], verdict=verdict, signals=signals))
    except StuckError as error:
        # By ourselves: the parent, which has asked for our end, has heard enough of us.
        complain(error, with_traceback=False)
        return error.status
    except (ConfigError, ExceptionGroup) as error:
        mistake = only(error, ConfigError)
        if mistake is None:
            raise
        # Of a kind that the parent knows, with a note for `-v`: a traceback does not travel.
        sent = DeviceError(str(mistake)) if isinstance(mistake, DeviceError) else ConfigError(str(mistake))
        sent.add_note("".join(traceback.format_exception(mistake)))
        line.send(sent)
        return 1
    finally:
        if sandbox is not None:
            sandbox.end()
    return 0


async def _end_with_parent(line: Line, finished: trio.Event) -> None:
    await line.wait_end()
    finished.set()


def _check_supervised(wanted: Sequence[DeviceSetup], engine: EngineName) -> None:
    """Raises ConfigError for what cannot be supervised."""
    if engine != "vfio-user":
        raise ConfigError(f"--supervise: not with --engine {engine}, which does not let go of its client")
    for setup in wanted:
        if not issubclass(setup.device_class, Device):
            raise ConfigError(f"{setup.name}: --supervise is for virtio devices: it restores their queues")
        if setup.common.fault:
            raise ConfigError(f"{setup.name}: fault=NAME: not with --supervise")


def _refuse_shared_terminal(wanted: Sequence[DeviceSetup]) -> None:
    """Within a process, `Stdio` itself takes care that two do not read from one terminal. Raises ConfigError."""
    users = [setup for setup in wanted if "stdio" in setup.arguments.get("chardev", ())]
    if len(users) > 1:
        raise ConfigError(f"{users[1].driver}: stdio: another port has it; only one can")
