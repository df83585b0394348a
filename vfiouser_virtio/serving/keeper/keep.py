"""Keeper and processes of one described device: what ``serve --supervise`` runs in the place of each device."""

import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from vfiouser_virtio.engines import Socket, VfioUserEngine
from vfiouser_virtio.serving.child_process import Line
from vfiouser_virtio.serving.device_setup import DeviceSetup
from vfiouser_virtio.serving.keeper.attendant import RelayedListener, attendant
from vfiouser_virtio.serving.keeper.keeper import Keeper
from vfiouser_virtio.serving.keeper.mappings import dispatch_with_mappings
from vfiouser_virtio.serving.keeper.process import ENDED, Beginning
from vfiouser_virtio.supervision.pci import SupervisedPci, supervised
from vfiouser_virtio.supervision.stand_in import stand_in
from vfiouser_virtio.transports.pci import VirtioPci
from vfiouser_virtio.vfio_user import Listener, OpenTrace, Server
from vfiouser_virtio.vfio_user.server.session import Session

HANG_AFTER_S = 3.0
"""Seconds after which a process that does not answer is killed: QEMU gives up a device that has not answered for 5."""

_COMM_LENGTH = 15  # of a process's name, in bytes


@dataclass(frozen=True, slots=True)
class Supervision:
    """Options of supervision."""

    hang_after: float = HANG_AFTER_S
    """Seconds; 0: a process is never taken for hung."""
    max_memory: int = 0
    """Bytes of its own that a process may have; 0: as many as there are."""


class ServeDevice(Protocol):
    """Serving of one device in a process of its own, until its end; gives the exit status."""

    def __call__(
        self,
        setup: DeviceSetup,
        listener: Socket,
        *,
        line: Line,
        once: bool,
        make_function: Callable[..., VirtioPci],
        beside: Callable[[VirtioPci], Awaitable[None]],
        finished: Callable[[], None],
        signals: Sequence[signal.Signals],
    ) -> int: ...


def engine_of_device(*, write_multiple: bool, open_trace: OpenTrace | None) -> VfioUserEngine:
    """What speaks the protocol in a device's process: without sockets that the keeper does not see."""
    server = partial(Server, twin_socket=False, session=partial(Session, handler=dispatch_with_mappings))
    return VfioUserEngine(write_multiple=write_multiple, open_trace=open_trace, server=server)


def keep(
    setup: DeviceSetup,
    listener: Socket,
    line: Line,
    serve: ServeDevice,
    *,
    once: bool,
    supervision: Supervision,
    traced: bool,
) -> int:
    """Keep the device until its end; the exit status. Where messages are ``traced``, notifications stay messages."""
    assert isinstance(listener, Listener)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"keep {setup.name}"[:_COMM_LENGTH])

    def work(line: Line, begin: Beginning) -> int:
        made = stand_in(begin.journal) if begin.given_up else None
        function = supervised(begin.journal, begin.notifications, resuming=begin.resuming)
        attend = attendant(begin.pulse)

        async def beside(made: VirtioPci) -> None:
            assert isinstance(made, SupervisedPci)
            await attend(made)

        finished: list[None] = []
        status = serve(
            setup if made is None else setup._replace(made=made),
            RelayedListener(begin.clients, listener.name),
            line=line,
            once=once or listener.connected,
            make_function=function,
            beside=beside,
            finished=lambda: finished.append(None),
            signals=(),
        )
        if finished:  # else it cannot be made again: a death as others
            line.send({ENDED: status})
        return status

    keeper = Keeper(
        setup.name,
        listener,
        work,
        line,
        once=once,
        hang_after=supervision.hang_after,
        max_memory=supervision.max_memory,
        notify_by_eventfd=not traced,
    )
    return keeper.run()
