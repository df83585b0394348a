"""Tables of docs/evil.md, from the declarations."""

from vfiouser_virtio.faults.catalogue import FAULTS
from vfiouser_virtio.faults.declaration import Argument, Fault, Place
from vfiouser_virtio.faults.profiles import PROFILES


def tables() -> str:
    """All faults by place, then the profiles, in Markdown."""
    lines: list[str] = []
    for place in Place:
        lines += [f"### Faults of {place.value}", ""]
        lines += ["| fault | what it does | arguments | counts each | breaks |", "|---" * 5 + "|"]
        lines += [_row(fault) for fault in FAULTS.values() if fault.place is place]
        lines.append("")
    lines += ["### Profiles", "", "| profile | a device with it is like | faults |", "|---" * 3 + "|"]
    for name, profile in PROFILES.items():
        faults = ", ".join(f"`{fault}`" for fault in profile.faults)
        lines.append(f"| `{name}` | {profile.is_like} | {faults} |")
    return "\n".join(lines) + "\n"


def _row(fault: Fault) -> str:
    only = [f"on a {fault.ring} ring"] if fault.ring else []
    only += [f"of {fault.devices}"] if fault.devices != "any" else []
    only += [f"over {fault.transport}"] if fault.transport != "any" and fault.place is not Place.PCI else []
    does = fault.does + (f" (only {', '.join(only)})" if only else "")
    breaks = "no rule" if fault.breaks.startswith("none") else f"{fault.section}: {fault.breaks}"
    per = fault.per + (", of a queue" if fault.of_queue and "queue" not in fault.per else "")
    per += "; or by time" if fault.by_itself else ""
    return f"| `{fault.name}` | {does} | {'; '.join(map(_argument, fault.arguments))} | {per} | {breaks} |"


def _argument(argument: Argument) -> str:
    default = argument.default
    shown = f"{default * 1000:g}ms" if isinstance(default, float) else str(default)
    return f"`{argument.name}=`: {argument.help}" + ("" if default in (None, "") else f" ({shown})")
