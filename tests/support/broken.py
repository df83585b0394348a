"""A table of deliberately broken servers: for each conformance check, a small change of ours that it must see."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.virtio import DeviceCore, Offer, Virtqueue
from vfiouser_virtio.vring import PackedRing, SplitRing

Mutation = Callable[[pytest.MonkeyPatch], None]
Make = Callable[..., VirtioPci]
"""As `VirtioPci`: from a device and ``offer=``."""


@dataclass(frozen=True)
class Broken:
    """What makes a device with a fault, or a change of our own classes, and the device type that shows it."""

    make: Make
    change: Mutation
    device: str
    offer: Offer
    logs: str
    """A regular expression that is found in each line that it logs; "": it logs nothing."""


BROKEN: dict[str, Broken] = {}
"""By the id of the check that must fail."""


def breaks(*check_ids: str, device: str = "rng", logs: str = "", **offer: Any) -> Callable[[Any], Any]:
    """Register a fault for one or several checks, of a device that offers this.

    It is a subclass of a ring, of `Virtqueue`, `DeviceCore` or `VirtioPci`, that takes the place of ours; or a function
    that changes what cannot be replaced so.

    ``logs`` is what the intended fault, or the check itself, makes the server log: warnings and errors. Any other line
    fails the test, and so does a traceback: the check has then seen something else than what it is there for.
    """

    def register(fault: Any) -> Any:
        make, change = (made_with(fault), _nothing) if isinstance(fault, type) else (VirtioPci, fault)
        for check_id in check_ids:
            assert check_id not in BROKEN, check_id
            BROKEN[check_id] = Broken(make, change, device, Offer(**offer), logs)
        return fault

    return register


def made_with(fault: type) -> Make:
    """What makes a device whose function, core, virtqueues or rings are of this class."""
    if issubclass(fault, VirtioPci):
        return fault
    if issubclass(fault, DeviceCore):
        return functools.partial(VirtioPci, core=fault)
    if issubclass(fault, Virtqueue):
        return functools.partial(VirtioPci, core=functools.partial(DeviceCore, virtqueue=fault))
    assert issubclass(fault, SplitRing | PackedRing), fault
    kind = "split_ring" if issubclass(fault, SplitRing) else "packed_ring"
    return made_with(type(fault.__name__, (Virtqueue,), {kind: fault}))


def _nothing(_patch: pytest.MonkeyPatch) -> None:
    pass


def around(patch: pytest.MonkeyPatch, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function or method by ``replacement(original, *arguments)``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return replacement(original, *arguments, **named)

    patch.setattr(owner, name, wrapper)


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Call ``then`` with the same arguments once the original has returned."""

    def replacement(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        then(*arguments)
        return result

    around(patch, owner, name, replacement)
