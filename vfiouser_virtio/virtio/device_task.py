"""Task that runs a device: `Device.run` lives from each DRIVER_OK to the reset that follows (virtio 1.4, 3.1)."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError, GuestError
from vfiouser_virtio.groups import leaves, only
from vfiouser_virtio.virtio.author_line import definition, log_bug
from vfiouser_virtio.virtio.device import Device
from vfiouser_virtio.virtio.lost_chains import watch_for_lost_chains
from vfiouser_virtio.virtio.polling import pulse
from vfiouser_virtio.virtio.queue_ring import Spawn
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.virtio.unnotified import serve_unnotified
from vfiouser_virtio.virtio.virtqueue import Virtqueue

logger = logging.getLogger(__name__)

_RUN_BEFORE = Stop.RUN_BEFORE.value


class Runnable(Protocol):
    """Device that has a task: a virtio device, or a PCI device of the author's own, which has no queues."""

    async def run(self) -> None: ...


class DeviceTask:
    """Task of a device: ``failed`` is told of the exception that has ended `Device.run`; ``queues`` are the device's.

    With ``search`` the queues of a driver that never notifies are polled once that is clear.
    """

    def __init__(
        self,
        device: Runnable,
        queues: Sequence[Virtqueue],
        name: str,
        failed: Callable[[Exception], None],
        *,
        search: bool = False,
    ) -> None:
        self.device = device
        self.spawn: Spawn | None = None
        """Starts a task that ends with the run; None while there is no run."""
        self._queues = queues
        self._log = DeviceLog(logger, name)
        self._failed = failed
        self._search = search
        self._activated = self._warned = self._lost = False
        self._wake = trio.lowlevel.ParkingLot()
        self._scope: trio.CancelScope | None = None
        self._ended: Callable[[], None] | None = None

    def start(self) -> None:
        """DRIVER_OK: `serve` runs the device, when the run before has ended."""
        self._activated = True
        self._wake.unpark_all()

    @property
    def is_ending(self) -> bool:
        """Whether a run was stopped, and has not ended: its tasks may be about to go on with what they have waited for.

        Then `Stop.RUN_BEFORE` is to keep buffers of the next driver from them; the end of the run takes it back. What
        they took would be lost with them, and the driver wait for it without an end.
        """
        return self._scope is not None and self._scope.cancel_called

    def stop(self) -> None:
        """A reset: the run is cancelled; it ends when its task is next scheduled."""
        self._activated = False
        if self._scope is not None:
            self._scope.cancel()

    def replace(self, device: Runnable, ended: Callable[[], None]) -> None:
        """Cancel the run of the device, and run another one. ``ended`` is called between the two, or at once."""
        self.device = device
        self._warned = self._lost = False
        if self._scope is None:
            ended()
            return
        running = not self._scope.cancel_called
        self._ended = ended
        self.stop()
        if running:
            self.start()

    async def serve(self) -> None:
        """Run the device between each `start` and the `stop` that follows, until cancelled."""
        while True:
            while not self._activated:
                await self._wake.park()
            self._activated = False
            scope = self._scope = trio.CancelScope()
            try:
                with scope:
                    await self._run()
            except Exception as error:
                self._run_failed(_blame(error), resetting=scope.cancel_called)
            except BaseExceptionGroup as group:
                # Failed in the same moment as we are cancelled: that goes on, the failure has been told and ends here.
                errors, cancelled = group.split(Exception)
                if errors is not None:
                    self._run_failed(_blame(errors), resetting=scope.cancel_called)
                assert cancelled is not None
                raise cancelled from None
            if not scope.cancel_called:
                with trio.CancelScope() as self._scope:
                    await trio.sleep_forever()
            self._scope = None
            for queue in self._queues:
                if queue.stopped & _RUN_BEFORE:
                    queue.start(Stop.RUN_BEFORE)
            if self._ended is not None:
                ended, self._ended = self._ended, None
                ended()

    async def _run(self) -> None:
        """Returns only by an exception, or cancelled: an idle device still serves its configuration."""
        try:
            async with background() as nursery:  # an exception in a nursery of trio's stays in a cycle of its frames
                self.spawn = _spawner(nursery)
                for queue in self._queues:
                    queue.begin_run(self.spawn)
                if polled := [queue.peek for queue in self._queues if queue.polling.always]:
                    nursery.start_soon(pulse, polled)
                elif self._search:
                    nursery.start_soon(serve_unnotified, self._queues, self._poll)
                if self._queues and not self._lost:
                    nursery.start_soon(watch_for_lost_chains, self._queues, self._warn_of_loss)
                await self._awaitable()
                self._warn_of_end()
                await trio.sleep_forever()
        finally:
            self.spawn = None
            for queue in self._queues:
                queue.end_run()

    def _poll(self) -> None:
        """Until the next reset: with its notifications suppressed a driver could not be seen to notify after all."""
        for queue in self._queues:
            queue.poll_always()
        self._log.warning(
            "the driver does not notify the device of new requests: its queues are polled from now on, which takes "
            "some 5 % of a CPU, and all of one while there is work; poll=on does so from the start, poll=off never"
        )

    def _awaitable(self) -> Awaitable[None]:
        work: object = self.device.run()
        if not isinstance(work, Awaitable):
            run = type(self.device).run
            raise AuthorError(f"{definition(run)}: {run.__qualname__}() is not async: it returned {work!r}")
        return work

    def _warn_of_end(self) -> None:
        """An author's mistake more often than not: once for each device."""
        if self._queues and not self._warned:
            self._warned = True
            run = type(self.device).run
            what = "has no run()" if run is Device.run else f"run() returned ({definition(run)})"
            self._log.warning("%s: its queues are not served until the next DRIVER_OK", what)

    def _warn_of_loss(self, what: str) -> None:
        self._lost = True
        self._log.warning("%s", what)

    def _run_failed(self, error: Exception, *, resetting: bool) -> None:
        if not resetting:
            self._failed(error)
        elif not isinstance(error, GuestError):
            # Chains of before the reset are dead: touching one is no fault of anybody's.
            log_bug(self._log, "a bug in the device, found at its reset", error)


def _spawner(nursery: trio.Nursery) -> Spawn:
    def spawn(work: Callable[[], Awaitable[None]]) -> None:
        try:
            nursery.start_soon(work)
        except RuntimeError:
            pass  # the run has just ended, and its task has not come to say so: nothing more is done before the reset

    return spawn


def _blame(error: Exception) -> Exception:
    """The one GuestError inside nested groups, if there is nothing else in them; else the error as it is."""
    first, *others = leaves(error)
    return only(error, GuestError) or (first if not others and isinstance(first, Exception) else error)
