"""Case of the process fuzzer as JSON: a server's command line and surroundings, and what is done to it.

::

    devices   attacked 0, attacked 1, …, untouched, the neighbour's       each on a socket, in this order
    lanes     steps of attackers: each lane is a process of its own, with any number of clients
    host      steps of the host: a file system that hangs, a process that dies
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

HostileStep: TypeAlias = dict[str, Any]
"""One thing that is done: ``do`` names a function of `attacks` or `scenery`, the other keys are its parameters."""

Stderr = Literal["read", "unread", "closed"]
"""Reader of the server's stderr: all the time, only in the end, or there is no such file descriptor."""


@dataclass(slots=True)
class ProcessCase:
    """Attack on one server process. ``origin`` is family, seed and index; ``shows`` what it was kept for."""

    family: str
    devices: list[str]
    """Values of ``--device``; ``{folder}`` is the case's own folder. The last two are not attacked."""
    options: list[str] = field(default_factory=list)
    """Of `serve`."""
    stderr: Stderr = "read"
    foreign: bool = False
    """The attackers are of another user, for which we must be root."""
    files: list[HostileStep] = field(default_factory=list)
    """What there is before the server is started: functions of `scenery`."""
    lanes: list[list[HostileStep]] = field(default_factory=list)
    host: list[HostileStep] = field(default_factory=list)
    serves: bool = True
    """The server is to be ready; otherwise its configuration is a mistake, or takes for ever."""
    speaks: bool = False
    """Its log must say something of what is done."""
    seconds: float = 12.0
    """How long all steps of a lane may go on."""
    origin: str = ""
    shows: str = ""

    @property
    def attacked(self) -> int:
        """How many of the devices are attacked."""
        return len(self.devices) - 2

    @property
    def may_be_stuck(self) -> bool:
        """Whether a disk of the host hangs: its device keeps its client's memory until then, and may not be served."""
        return any(step["do"] == "hang" for step in self.host)

    @property
    def kills(self) -> bool:
        """Whether a device's process dies: it is to be started again, for which its server must be asked."""
        return any(step["do"] == "kill_process" for step in self.host)

    @property
    def needs_root(self) -> bool:
        return self.foreign or any(step["do"] in ("hanging_files", "small_disk") for step in self.files)

    def dumps(self) -> str:
        """Readable JSON, one step a line."""
        fields = asdict(self)
        lines = [f' "{name}": {_listed(value)}' for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def load(path: Path) -> "ProcessCase":
        """Read a case's file. Raises ValueError or TypeError for one that is none."""
        return ProcessCase(**json.loads(path.read_text()))


def _listed(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join("  [\n" + _lines(lane, 3) + "\n  ]" for lane in value) + "\n ]"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + _lines(value, 2) + "\n ]"
    return json.dumps(value)


def _lines(steps: Sequence[HostileStep], indent: int) -> str:
    return ",\n".join(" " * indent + json.dumps(step) for step in steps)
