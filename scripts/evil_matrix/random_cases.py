"""Cases drawn by a seed: several faults of a device at once, with schedules of all kinds."""

import random
from collections.abc import Callable
from contextlib import suppress

from evil_matrix.cases import EvilCase
from evil_matrix.exercises import EXERCISES
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FAULTS, parse_fault
from vfiouser_virtio.faults.declaration import MADE, Argument, Fault, Place, feature_bit, integer, seconds

# What makes Linux wait for ever by design, keeps it from seeing the device at all, or makes all that it does too slow:
# alone in evil-matrix, and nothing beside it would be seen.
_LEFT_OUT = {
    "reset-stuck",
    "features-refused",
    "capability-missing",
    "capability-loop",
    "capability-outside",
    "register-read-late",
    "register-write-late",
}
_MOST_FAULTS = 4


def random_case(seed: int, number: int, devices: tuple[str, ...] = tuple(EXERCISES)) -> EvilCase:
    """The case with this number; the same arguments give the same case."""
    rng = random.Random(f"{seed}:{number}")
    device = rng.choice(devices)
    packed = rng.random() < 0.3
    ring = "packed" if packed else "split"
    known = [
        fault
        for fault in FAULTS.values()
        if fault.devices in ("any", device) and fault.ring in ("", ring) and fault.name not in _LEFT_OUT
    ]
    known = [fault for fault in known if fault.name != "config-value" or _FIELDS[device]]
    chosen = rng.sample(known, rng.randint(1, _MOST_FAULTS))
    return EvilCase(device, tuple(_valid(rng, fault, device) for fault in chosen), "packed=on" if packed else "")


def _valid(rng: random.Random, fault: Fault, device: str) -> str:
    while True:
        text = _fault(rng, fault, device)
        with suppress(ConfigError):  # an argument with limits of its own
            parse_fault(text)
            return text


def _fault(rng: random.Random, fault: Fault, device: str) -> str:
    words = [fault.name, *_schedule(rng, fault)]
    for argument in fault.arguments:
        needed = fault.name == "config-value" and argument.name == "field"
        if needed:
            words.append(f"field={rng.choice(_FIELDS[device])}")
        elif rng.random() < 0.5 and (value := _value(rng, fault, argument)) is not None:
            words.append(f"{argument.name}={value}")
    return ":".join(words)


def _schedule(rng: random.Random, fault: Fault) -> list[str]:
    if fault.per == MADE:
        return []
    kind = rng.choice(("always", "p", "at", "every", "after"))
    words = {
        "always": [],
        "p": [f"p={rng.choice((0.01, 0.1, 0.5))}"],
        "at": [f"at={rng.choice((1, 2, 3, 8, 20, 50))}"],
        "every": [f"every={rng.choice((2, 3, 7, 30))}"],
        "after": [f"after={rng.choice((1, 5, 20, 60))}"],
    }[kind]
    # A storm of everything at each opportunity tells less than one blow at a time.
    return words if kind == "at" or rng.random() < 0.5 else [*words, f"count={rng.choice((1, 2, 5))}"]


def _value(rng: random.Random, fault: Fault, argument: Argument) -> str | None:
    if argument.name == "to":  # another queue: there may be none
        return None
    make = _VALUES.get(argument.convert)
    return None if make is None or (fault.place is Place.PCI and argument.name == "type") else make(rng)


_VALUES: dict[Callable[..., object], Callable[[random.Random], str]] = {
    integer: lambda rng: str(rng.choice((0, 1, 2, 3, 255, 256, 1024, 4096, 65535, 1 << 31, (1 << 32) - 1))),
    seconds: lambda rng: rng.choice(("0ms", "1ms", "50ms", "500ms", "2s")),
    feature_bit: lambda rng: str(rng.randrange(64)),
}

_FIELDS = {
    "blk": ("capacity", "size_max", "seg_max", "blk_size", "num_queues", "max_discard_sectors", "wce"),
    "net": ("mac", "status", "max_virtqueue_pairs", "mtu"),
    "console": ("cols", "rows", "max_nr_ports"),
    "balloon": ("num_pages", "actual"),
    "input": ("select", "subsel", "size"),
    "rng": (),
}
