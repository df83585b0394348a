"""Fuzz case as JSON: the device, its memory, and the steps of a client. Corpus files are these."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

Step: TypeAlias = dict[str, Any]
"""One thing that the client does: ``do`` names a method of `perform.Performer`, the other keys are its parameters."""

Kind = Literal["messages", "registers", "rings", "requests"]
"""Kinds of cases for our own stack."""
Memory = Literal["shared", "private", "mixed"]
"""Whether regions come with a file descriptor: all, none, or every other."""


@dataclass(slots=True)
class Case:
    """Fuzz case: ``origin`` is where it came from (seed and index), ``shows`` what a corpus file was written for."""

    kind: Kind | Literal["conversation", "parser"]
    """A conversation is for any server, through its socket (`servers.player`), a parser is fuzzed alone (`parsers`)."""
    target: str
    memory: Memory = "shared"
    twin: bool = False
    """DMA requests have a socket of their own."""
    direct: bool = False
    """Registers are accessed without the socket, which takes most of the time: what a case is about lies behind it."""
    hello: bool = True
    """VERSION and the memory are sent before the first step; else the steps begin on a silent connection."""
    audited: bool = False
    """The driver of the virtio device is audited: nothing is to be different for it."""
    offer: dict[str, Any] = field(default_factory=dict)
    """What the device offers beside its type's features: arguments of `virtio.Offer`."""
    origin: str = ""
    shows: str = ""
    steps: list[Step] = field(default_factory=list)

    def clients(self) -> "Iterator[Case]":
        """The part of each client: where a step is ``client`` one leaves and another comes, as the step says."""
        start = 0
        part = replace(self)
        for end, step in enumerate([*self.steps, {"do": "client"}]):
            if step["do"] == "client":
                yield replace(part, steps=self.steps[start:end])
                start = end + 1
                part = replace(part, **{name: value for name, value in step.items() if name != "do"})

    def dumps(self) -> str:
        """Readable JSON, one step a line."""
        head = asdict(self)
        steps = head.pop("steps")
        lines = ",\n".join("  " + json.dumps(step) for step in steps)
        return json.dumps(head, indent=1)[:-2] + ',\n "steps": [\n' + lines + "\n ]\n}\n"

    @staticmethod
    def load(path: Path) -> "Case":
        """Read a corpus file. Raises ValueError or TypeError for one that is none."""
        return Case(**json.loads(path.read_text()))
