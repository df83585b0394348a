"""Device core with a journal: status, features and queues can be gone on with after a death of the process."""

from collections.abc import Callable, Mapping
from typing import Any

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.supervision.errors import CannotResume
from vfiouser_virtio.supervision.journal import Journal
from vfiouser_virtio.supervision.virtqueue import JournaledVirtqueue
from vfiouser_virtio.virtio import Device, DeviceCore, InterruptSink, Stop, Virtqueue
from vfiouser_virtio.vring import RingFeatures


class SupervisedCore(DeviceCore):
    """`DeviceCore` whose queues write a journal, the memfd ``journal_fd``. The rest of the arguments are its."""

    def __init__(
        self, device: Device, memory: GuestMemory, interrupts: InterruptSink, *, journal_fd: int, **named: Any
    ) -> None:
        self.on_change: Callable[[], None] = _nothing
        """Called when something has changed that no access of the driver has caused."""
        journal: Journal | None = None
        self._journaled: list[JournaledVirtqueue] = []

        def make_queue(index: int, *arguments: Any, **options: Any) -> Virtqueue:
            nonlocal journal
            # Only now: `Offer.queue_size` has changed the device's sizes by then.
            journal = journal or Journal(journal_fd, [queue.max_size for queue in device.queues])
            made = JournaledVirtqueue(
                index, *arguments, journal=journal.queues[index], on_change=lambda: self.on_change(), **options
            )
            self._journaled.append(made)
            return made

        super().__init__(device, memory, interrupts, virtqueue=make_queue, **named)
        self.journal = journal or Journal(journal_fd, [])

    # ---- what changes without the driver -------------------------------------------------------------------------

    def _show_needs_reset(self) -> None:
        super()._show_needs_reset()
        self.on_change()

    def _suspended(self) -> None:
        super()._suspended()
        self.on_change()

    def _finish_reset(self) -> None:
        super()._finish_reset()
        self.on_change()

    def _interrupt_config(self) -> None:
        self.on_change()  # first: with the interrupt the driver reads the generation
        super()._interrupt_config()

    # ---- registers -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver has set, as plain data for JSON."""
        resetting = self._resetting is not None  # what it waits for ends with the process
        fields = {name: self.device.config[name] for name in self.device.driver_writes}
        return {
            "status": 0 if resetting else self._status,
            "features": 0 if resetting else self.driver_features,
            "generation": self._config.generation,
            "fields": {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()},
            "queues": {queue.index: queue.registers() for queue in self._journaled if queue.enabled or queue.desc},
            "sizes": [queue.max_size for queue in self.device.queues],
            "another": any(queue.stopped & Stop.UNTIL_KICK.value for queue in self.queues),
        }

    def restore(self, state: Mapping[str, Any], why_not: str) -> str:
        """Go on with what `state` has returned in another process; what there is to say of it, empty for nothing.

        ``why_not`` is a reason not to, where the driver runs the device; empty for none.

        Where the device cannot go on it raises, mostly CannotResume, with its registers as they were, and `lose` is
        what follows.
        """
        self._status, self.driver_features = state["status"], state["features"]
        self._config.restore(state["generation"])
        self._restore_queues(state)
        if not self._status & DeviceStatus.FEATURES_OK:
            return ""
        if self._status & DeviceStatus.NEEDS_RESET:
            self._show_needs_reset()
            return "it needed a reset before"
        running = bool(self._status & DeviceStatus.DRIVER_OK)
        if running and why_not:
            raise CannotResume(why_not)
        self._check(state, running=running)
        if not self.device.features_ok():
            raise CannotResume(f"it refuses the features {self.driver_features:#x} now")
        fields: dict[str, int | str] = state["fields"]
        self.device.resumed(
            {name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in fields.items()}
        )
        requests = sum(queue.resume_ring(running=running) for queue in self._journaled if queue.enabled)
        if not running:
            return ""
        self._task.start()
        self.start(Stop.NOT_DRIVER_OK)
        for queue in self._journaled:
            queue.interrupt_again()
        self._config.changed()  # it may be another one: a file may have become longer
        return f"{requests} requests that were under way are done again"

    def _restore_queues(self, state: Mapping[str, Any]) -> None:
        if self._status & DeviceStatus.FEATURES_OK:
            self.device.driver_features = self.driver_features
            for queue in self.queues:
                queue.negotiate(RingFeatures.of(self.driver_features))
        saved: dict[str, list[int]] = state["queues"]
        if state["sizes"] != [queue.max_size for queue in self.device.queues]:
            raise CannotResume(f"its queues had {state['sizes']} entries")
        for index, registers in saved.items():
            self._journaled[int(index)].restore_registers(registers)

    def _check(self, state: Mapping[str, Any], *, running: bool) -> None:
        """Raises CannotResume for a device of which it is known beforehand."""
        alien = self.driver_features & ~self.device_features
        if alien:
            raise CannotResume(f"the feature bits {alien:#x}, which the driver has accepted, are not offered any more")
        if self._status & DeviceStatus.SUSPEND:
            raise CannotResume("it was suspended")
        if running and not self.device.can_resume():
            raise CannotResume("it is of a kind that cannot go on without its memory (Device.can_resume)")
        if running and state["another"]:
            raise CannotResume("its driver belongs to a client that had left")

    def lose(self, *, known: bool = True) -> None:
        """The device cannot go on: its driver is told so, also one that is not ``known`` to be there."""
        if self._status or not known:
            self._show_needs_reset()


def _nothing() -> None:
    pass
