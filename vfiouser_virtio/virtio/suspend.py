"""Device Suspend (virtio 1.4, 2.1 and "Device Suspend"): stop between two requests, keep everything, go on later.

::

    DRIVER_OK ─── the driver sets SUSPEND ───▶ draining ─── nothing is under way ───▶ SUSPEND without DRIVER_OK
        ▲                                         │ for longer than DRAIN_TIMEOUT              │
        │                                         ▼                                             │
        │                                    NEEDS_RESET                                        │
        └────────────────────────── the driver sets DRIVER_OK ◀─────────────────────────────────┘

A request that the kernel works on ends first, is shown as used, and notified. But a device may also just keep a buffer
until something happens outside, for ever perhaps: a console without a reader, an entropy device that has given
all it may for now. Such a buffer stays with it over the suspension, and is used after it.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto

import trio

from vfiouser_virtio.virtio.device_task import DeviceTask
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.virtio.virtqueue import Virtqueue

DRAIN_TIMEOUT = 5.0
"""Seconds for requests that use guest memory: a slow disk may need them."""
KEPT_TIMEOUT = 0.25
"""Seconds for buffers that a device has, while nothing uses guest memory: it is about to use them, or waits."""
# Seconds between two looks: so that nothing in the path of requests has to tell of its progress.
_LOOK = 0.001


def unfinished(queues: Sequence[Virtqueue]) -> bool:
    """Whether a device has buffers of these queues, or guest memory is being used for them."""
    return any(queue.at_work or queue.outstanding for queue in queues)


async def drain(queues: Sequence[Virtqueue], wanted: Callable[[], bool]) -> bool:
    """Wait for the requests that a device has, of queues that hand out no more; whether no guest memory is used then.

    Also returns when that is not ``wanted`` any more.
    """
    started = trio.current_time()
    while wanted():
        waited = trio.current_time() - started
        at_work = any(queue.at_work for queue in queues)
        if not unfinished(queues) or (not at_work and waited > KEPT_TIMEOUT):
            return True
        if waited > DRAIN_TIMEOUT:
            return False
        await trio.sleep(_LOOK)
    return not any(queue.at_work for queue in queues)


class SuspendFailed(Exception):
    """Request that did not end in time, so that the device cannot say that it has stopped."""


class Phase(Enum):
    """State of a device between two suspensions."""

    RUNNING = auto()
    DRAINING = auto()
    SUSPENDED = auto()


class Suspension:
    """Queues of one device, whose run is ``task``, stopped and started together.

    ``suspended`` is called when all has stopped, perhaps from within `begin`; ``failed`` when it does not stop.
    """

    def __init__(
        self,
        queues: Sequence[Virtqueue],
        task: DeviceTask,
        suspended: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.phase = Phase.RUNNING
        self._queues = queues
        self._task = task
        self._suspended = suspended
        self._failed = failed

    def begin(self) -> None:
        """The driver asks for it: no more buffers are taken, and those that were are waited for."""
        if self.phase is not Phase.RUNNING:
            return
        self.phase = Phase.DRAINING
        for queue in self._queues:
            queue.stop(Stop.DRAINING)
        spawn = self._task.spawn
        if spawn is None or not unfinished(self._queues):  # without a run of the device nothing is in its hands
            self._reached()
        else:
            spawn(self._drain)

    def end(self) -> None:
        """The driver resumes or resets the device, or there is no hope for it: buffers are taken again."""
        if self.phase is Phase.RUNNING:
            return
        self.phase = Phase.RUNNING
        for queue in self._queues:
            queue.start(Stop.DRAINING | Stop.SUSPENDED)

    async def _drain(self) -> None:
        drained = await drain(self._queues, lambda: self.phase is Phase.DRAINING)
        if self.phase is not Phase.DRAINING:
            return
        if drained:
            self._reached()
        else:
            self._failed(SuspendFailed(f"SUSPEND: requests still use guest memory after {DRAIN_TIMEOUT:g} s"))

    def _reached(self) -> None:
        self.phase = Phase.SUSPENDED
        for queue in self._queues:
            queue.stop(Stop.SUSPENDED)
        self._suspended()
