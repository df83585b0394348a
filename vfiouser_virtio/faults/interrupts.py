"""Interrupts that get lost, come late, too often, elsewhere: an `InterruptSink` before the real one."""

from vfiouser_virtio.faults.later import MAX_REPEATED, Timer
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.virtio.interrupt_sink import InterruptSink

MAX_STORM = 100_000
"""Interrupts of one storm."""


class FaultyInterrupts:
    """Interrupt sink with faults; ``real`` delivers what is sent."""

    def __init__(self, real: InterruptSink, faults: FaultPlan, timer: Timer) -> None:
        self.real = real
        self._faults = faults
        self._timer = timer

    def queue_interrupt(self, index: int) -> None:
        """As `InterruptSink.queue_interrupt`."""
        hit = self._faults.hit
        # All are counted, whichever happens: a schedule does not depend on other faults.
        lost = hit("interrupt-lost", index)
        wrong = hit("interrupt-wrong-vector", index, possible=not lost)
        late = hit("interrupt-late", index, possible=not (lost or wrong))
        if lost:
            lost.did("not sent")
        elif wrong:
            to = wrong["to"]
            wrong.did("sent as a configuration change" if to < 0 else f"sent as one of queue {to}")
            self._send(to)
        elif late:
            late.did(f"sent {late['time']:g} s later")
            if not self._timer.later(late["time"], lambda: self._send(index)):
                self._send(index)
        else:
            self._send(index)
        if storm := hit("interrupt-storm", index):
            times = max(0, min(storm["times"], MAX_STORM) - 1)
            # Not at once: an eventfd makes one of those that come together.
            goes_on = self._timer.repeat(times, max(storm["time"], 1e-6), lambda: self._send(index))
            storm.did(f"sent {times} times more" if goes_on else f"sent once: {MAX_REPEATED} storms go on already")

    def config_interrupt(self) -> None:
        """As `InterruptSink.config_interrupt`."""
        if lost := self._faults.hit("config-interrupt-lost"):
            lost.did("not sent")
        else:
            self.real.config_interrupt()

    def interrupt_now(self, hit: Hit) -> None:
        """Interrupt of a queue that has used nothing."""
        hit.did("sent, and nothing was used")
        self._send(hit.queue or 0)

    def config_interrupt_now(self, hit: Hit) -> None:
        """Configuration interrupt without a change."""
        hit.did("sent, and nothing has changed")
        self.real.config_interrupt()

    def enabled(self, index: int) -> None:
        """The driver has enabled a queue."""
        if early := self._faults.hit("interrupt-early", index):
            early.did("sent before DRIVER_OK")
            self._send(index)

    def _send(self, index: int) -> None:
        if index < 0:
            self.real.config_interrupt()
        else:
            self.real.queue_interrupt(index)
