"""Report of a soak: what was done and what was found, as Markdown and as JSON."""

import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vfiouser_virtio.testing.soak.kills import KillResult
from vfiouser_virtio.testing.soak.linux import LinuxResult
from vfiouser_virtio.testing.soak.servers import ServerResult

_MIB = 1 << 20


@dataclass
class SoakReport:
    """All results."""

    seed: int
    seconds: float = 0
    disks: dict[str, KillResult] = field(default_factory=dict)
    servers: list[ServerResult] = field(default_factory=list)
    linux: LinuxResult | None = None
    complaints: list[str] = field(default_factory=list)
    """Of the soak itself."""

    def add_disk(self, name: str, result: KillResult) -> None:
        """One more disk of that plan has been through it."""
        total = self.disks.setdefault(name, KillResult())
        total.flushed += result.flushed
        total.started += result.started
        total.kills += result.kills
        total.complaints += result.complaints

    @property
    def findings(self) -> list[str]:
        """All complaints; the soak is good where there is none."""
        found = list(self.complaints)
        parts: list[KillResult | ServerResult] = [*self.disks.values(), *self.servers]
        for part in parts:
            found += part.complaints
        return found + (self.linux.complaints if self.linux else [])

    def as_json(self) -> str:
        """Everything, but for the single samples."""
        servers: list[dict[str, Any]] = []
        for each in self.servers:
            growth = asdict(each.growth) if each.growth else None
            servers.append({**vars(each), "growth": growth, "samples": len(each.samples)})
        what = {
            "seed": self.seed,
            "seconds": round(self.seconds),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "disks": {name: vars(each) for name, each in self.disks.items()},
            "servers": servers,
            "linux": vars(self.linux) if self.linux else None,
            "findings": self.findings,
        }
        return json.dumps(what, indent=1) + "\n"

    def as_text(self) -> str:
        """For people, in Markdown."""
        lines = [f"Seed {self.seed}, {self.seconds / 60:.0f} minutes, Python {platform.python_version()}.", ""]
        if self.disks:
            kills = sum((each.kills for each in self.disks.values()), Counter[str]())
            flushed = sum(each.flushed for each in self.disks.values())
            lines += [f"Disks: {flushed} flushed writes, {kills.total()} kills.", ""]
            lines += ["| disk | writes | flushed | guest killed | server killed | both |", "|---|---|---|---|---|---|"]
            for name, each in self.disks.items():
                count = each.kills
                numbers = each.started, each.flushed, count["guest"], count["server"], count["both"]
                lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
            lines.append("")
        if self.servers:
            head = "| server | visits | visitors killed | private memory, MiB | descriptors | mappings |"
            lines += [head, "|---|---|---|---|---|---|"]
            lines += [self._server(each) for each in self.servers]
            lines.append("")
        if self.linux:
            ends = ", ".join(f"{number} {how}" for how, number in self.linux.ended.items())
            lines += [f"Linux guests: {self.linux.guests}, {self.linux.steps} steps of mixed load; {ends}.", ""]
        found = self.findings
        lines.append(f"{len(found)} findings" + (":" if found else "."))
        return "\n".join([*lines, *(f"\n- {each}" for each in found)]) + "\n"

    @staticmethod
    def _server(each: ServerResult) -> str:
        if each.growth is None:
            numbers = ["too short to say"] * 3
        else:
            first, last = each.growth.first, each.growth.last
            numbers = [
                f"{first.memory / _MIB:.1f} → {last.memory / _MIB:.1f}",
                f"{first.fds} → {last.fds}",
                f"{first.mappings} → {last.mappings}",
            ]
        return f"| {each.name} | {each.visits} | {each.killed} | " + " | ".join(numbers) + " |"
