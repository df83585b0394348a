"""Requests of a `Bridge` to its simulator, which it answers in order: accesses of registers, and resets."""

import logging
from collections import OrderedDict
from dataclasses import dataclass

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.holds import HOLD_TIMEOUT
from vfiouser_virtio.pci.simulator_link import SimulatorError, SimulatorLink, SimulatorMessage
from vfiouser_virtio.protocols.rtl_bridge import ACCESS_CODEC, RtlMessage, RtlStatus, pack_message
from vfiouser_virtio.vfio_device import Hold

WRITES_AHEAD = 64
"""Requests under way, from which on a write keeps its client waiting."""
MAX_REQUESTS = 512
"""Requests under way: a client that does not wait gets no more of our memory, and a simulator no more to do."""


@dataclass(slots=True, eq=False)
class SimulatorRequest:
    """Request that is under way. ``data`` is its answer; all-ones until that comes, or where it is void."""

    kind: RtlMessage
    what: str
    data: bytes = b""
    void: bool = False
    """Too late for an answer."""
    hold: Hold | None = None

    def end(self) -> None:
        """The guest waits no longer."""
        hold, self.hold = self.hold, None
        if hold is not None:
            hold.finish()


class SimulatorRequests:
    """Requests of one device to one simulator after another."""

    def __init__(self, log: DeviceLog) -> None:
        self.hangs = False
        """An answer did not come in time: until one comes, the guest does not wait for any."""
        self.resets = 0
        """RESETs under way: until the last is answered, what the simulator says is of before."""
        self._log = log
        self._under_way: OrderedDict[int, SimulatorRequest] = OrderedDict()
        self._number = 0
        self._writers: list[Hold] = []  # of clients that wait until there are fewer requests

    @property
    def full(self) -> bool:
        """Whether there are so many that no more can be made."""
        return len(self._under_way) >= MAX_REQUESTS

    def read(self, link: SimulatorLink, bar: int, offset: int, size: int) -> SimulatorRequest:
        """Ask for a register."""
        what = f"a read of {size} bytes at BAR{bar}+{offset:#x}"
        return self._ask(
            link, SimulatorRequest(RtlMessage.READ, what, b"\xff" * size), ACCESS_CODEC.pack(bar, size, offset)
        )

    def write(self, link: SimulatorLink, bar: int, offset: int, data: bytes) -> None:
        """Store a register."""
        what = f"a write of {len(data)} bytes at BAR{bar}+{offset:#x}"
        self._ask(link, SimulatorRequest(RtlMessage.WRITE, what), ACCESS_CODEC.pack(bar, len(data), offset) + data)

    def reset(self, link: SimulatorLink) -> None:
        """Reset the design. No answer of before is for the guest any more."""
        self.give_up()
        if not self._under_way or next(reversed(self._under_way.values())).kind is not RtlMessage.RESET:
            self.resets += 1
            self._ask(link, SimulatorRequest(RtlMessage.RESET, "a reset"))

    def writer_waits(self) -> Hold | None:
        """Where there are too many for a simulator that still answers: a hold that ends when there are fewer."""
        if len(self._under_way) < WRITES_AHEAD or self.hangs:
            return None
        self._writers.append(Hold(on_expire=self.no_answer))
        return self._writers[-1]

    def _ask(self, link: SimulatorLink, request: SimulatorRequest, body: bytes = b"") -> SimulatorRequest:
        self._number = (self._number + 1) & 0xFFFF_FFFF
        self._under_way[self._number] = request
        link.send(pack_message(request.kind, self._number, body))
        return request

    def answered(self, message: SimulatorMessage) -> None:
        """A reply has come. Raises SimulatorError for one that is not that of the oldest request."""
        number = next(iter(self._under_way), None)
        if number is None or number != message.number or self._under_way[number].kind is not message.kind:
            raise SimulatorError(
                f"a reply to {message.kind.name} {message.number:#x}, which was not asked, or not before all others"
            )
        request = self._under_way[number]
        if message.status != RtlStatus.OK:
            text = "the simulator refuses %s, status %#x"
            self._log.once(("refused", request.kind), text, request.what, message.status)
        elif len(message.body) != len(request.data):
            raise SimulatorError(f"{len(message.body):#x} bytes in reply to {request.what}")
        elif not request.void:
            request.data = message.body
        del self._under_way[number]
        if request.kind is RtlMessage.RESET:
            self.resets -= 1
        if self.hangs:
            self.hangs = False
            self._log.once("again", "the simulator answers again", level=logging.INFO)
        request.end()
        if len(self._under_way) < WRITES_AHEAD // 2:
            self._end(self._writers)

    def no_answer(self) -> None:
        """The engine waits no longer."""
        self.hangs = True
        oldest = next(iter(self._under_way.values())).what if self._under_way else "a request"
        text = "the simulator has not answered %s for %g s: until it answers, registers read as all-ones"
        self._log.once("hangs", text, oldest, HOLD_TIMEOUT)
        self.give_up()

    def give_up(self) -> None:
        """The guest waits for nothing that is under way."""
        for request in self._under_way.values():
            request.void = True
            request.end()
        self._end(self._writers)

    def forget(self) -> None:
        """The simulator is gone."""
        self.give_up()
        self._under_way.clear()
        self.resets, self.hangs = 0, False

    @staticmethod
    def _end(holds: list[Hold]) -> None:
        while holds:
            holds.pop().finish()
