"""Lane of attackers: a process of its own (`attackers` starts it) that carries out hostile steps.

Its clients may be killed by what they do (an access to memory whose file they truncated), and hold no lock of the
process that watches. On stdin it is told what to do next, a word a line; on stdout it says a JSON object a line::

    (by itself)                                                        → {"ready": true}
    begin      carry out the steps                                    → {"done": true}
    leave      all clients that are still there leave                 → {"left": true}
    snapshot   remember what is in the memory of all clients           → {"seen": true}
    compare    which memory has changed since then                     → {"changed": ["0-1", …]}
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vfiouser_virtio.testing.fuzz.deadline import Deadline, waited_for_cpu
from vfiouser_virtio.testing.fuzz.process.case import HostileStep
from vfiouser_virtio.testing.fuzz.process.memories import HostileMemory
from vfiouser_virtio.testing.fuzz.process.server import descendants
from vfiouser_virtio.testing.raw.blocking import BlockingClient

FOREIGN_UID = 65534
ATTACKERS = "attackers"
"""Folder of the case in which attackers of any user may make files."""
TIMEOUT = 15.0
"""Seconds of a system call on a socket; the server's neighbour says whether that was too long."""


@dataclass
class Lane:
    """Lane of one case, with its clients by number."""

    number: int
    sockets: list[str]
    folder: Path
    seconds: float
    """How long all of its steps may go on, without waits for a CPU."""
    server: int
    """Process that is attacked."""
    clients: dict[int, BlockingClient] = field(default_factory=dict)
    memories: dict[str, HostileMemory] = field(default_factory=dict)
    end: Deadline = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """The time of its steps begins."""
        self.end = Deadline(self.seconds, self._waited, at_once=True)

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return not self.end.over()

    def during(self, seconds: float) -> Callable[[], bool]:
        """What is asked whether a step goes on that lasts so long, or until the end of the lane.

        An attack does as much on a machine that has other things to do: its seconds are those in which neither it nor
        the server waits for a CPU.
        """
        end = Deadline(seconds, self._waited, at_once=True)
        return lambda: not end.over() and self.goes_on()

    def _waited(self) -> float:
        return sum(map(waited_for_cpu, (os.getpid(), *descendants(self.server))))


def main(arguments: list[str]) -> int:
    """Entry point; the one argument is JSON: lane, sockets, folder, seconds, foreign, steps."""
    from vfiouser_virtio.testing.fuzz.process.attacks import STEPS

    spec = json.loads(arguments[0])
    os.nice(5)  # what is to be seen is the server's time, and not whose turn it is on the CPU
    if spec["foreign"]:
        os.setgroups([])
        os.setresgid(FOREIGN_UID, FOREIGN_UID, FOREIGN_UID)
        os.setresuid(FOREIGN_UID, FOREIGN_UID, FOREIGN_UID)
    lane = Lane(spec["lane"], spec["sockets"], Path(spec["folder"]), spec["seconds"], spec["server"])
    _say({"ready": True})
    for line in sys.stdin:
        match line.strip():
            case "begin":
                lane.begin()
                steps: list[HostileStep] = spec["steps"]
                for step in steps:
                    parameters = dict(step)
                    function = STEPS[parameters.pop("do")]
                    try:
                        function(lane, **parameters)
                    except (OSError, KeyError) as error:
                        # Refused, hung up, or about a client that is gone: all of it may be.
                        _say({"refused": step["do"], "why": repr(error)})
                    if not lane.goes_on():
                        _say({"refused": step["do"], "why": f"the {lane.seconds:.0f} s of the attack are over"})
                        break
                _say({"done": True})
            case "leave":
                for client in lane.clients.values():
                    client.socket.close()
                lane.clients.clear()
                _say({"left": True})
            case "snapshot":
                for memory in lane.memories.values():
                    memory.snapshot()
                _say({"seen": True})
            case "compare":
                _say({"changed": [name for name, memory in lane.memories.items() if memory.has_changed()]})
    return 0


def _say(event: dict[str, object]) -> None:
    print(json.dumps(event), flush=True)
