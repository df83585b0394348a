"""Profiles of faults: several with one name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """Several faults: ``fault=profile:NAME``."""

    is_like: str
    """What a device with it is like."""
    faults: tuple[str, ...]
    devices: str = "any"
    """The device types that can have it."""


PROFILES = {
    "malicious": Profile(
        "a device that attacks its driver: every lie about rings, seldom, in whatever order",
        (
            "used-id-out-of-range:p=0.0005",
            "used-id-not-in-flight:p=0.0005",
            "used-id-of-another:p=0.0005",
            "used-twice:p=0.0005",
            "used-len-long:p=0.002",
            "used-rewritten:p=0.002",
            "interrupt-spurious:p=0.01",
            "config-interrupt-spurious:p=0.01",
            "config-changes:p=0.01",
        ),
    ),
    "flaky-disk": Profile(
        "a disk at its end: errors, long waits, now and then a wrong bit, and writes that a reset loses",
        (
            "io-error:p=0.001",
            "disk-slow:p=0.01:time=200ms",
            "disk-slow:p=0.0005:time=5s",
            "read-flipped:p=0.0001",
            "write-torn:p=0.0001",
            "write-dropped:p=0.05",
        ),
        devices="blk",
    ),
    "hotplug-storm": Profile(
        "a device that comes and goes: resets that are asked for, configuration changes, and registers that vanish",
        (
            "needs-reset:p=0.002",
            "config-interrupt-spurious:p=0.2",
            "config-changes:p=0.02",
            "registers-all-ones:p=0.0005:time=200ms",
        ),
    ),
    "slow-tail": Profile(
        "a device that is quick mostly, and sometimes very slow",
        ("used-late:p=0.01:time=200ms", "used-late:p=0.001:time=2s"),
    ),
    "bad-interrupts": Profile(
        "a platform that loses, repeats and delays interrupts",
        ("interrupt-lost:p=0.01", "interrupt-late:p=0.05:time=20ms", "interrupt-storm:p=0.01:times=50"),
    ),
}
"""By name."""
