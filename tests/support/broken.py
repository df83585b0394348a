"""A table of deliberately broken servers: for each conformance check, a small change of ours that it must see."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from vfiouser_virtio.virtio import Offer

Mutation = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Broken:
    """A change of our own classes, and the device type that shows it."""

    change: Mutation
    device: str
    offer: Offer
    logs: str
    """A regular expression that is found in each line that it logs; "": it logs nothing."""


BROKEN: dict[str, Broken] = {}
"""By the id of the check that must fail."""


def breaks(*check_ids: str, device: str = "rng", logs: str = "", **offer: Any) -> Callable[[Mutation], Mutation]:
    """Register a change for one or several checks, of a device that offers this.

    ``logs`` is what the intended fault, or the check itself, makes the server log: warnings and errors. Any other line
    fails the test, and so does a traceback: the check has then seen something else than what it is there for.
    """

    def register(change: Mutation) -> Mutation:
        for check_id in check_ids:
            assert check_id not in BROKEN, check_id
            BROKEN[check_id] = Broken(change, device, Offer(**offer), logs)
        return change

    return register


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


def only_notified_queues_are_served(patch: pytest.MonkeyPatch) -> None:
    """Drivers that never notify are not served: a fault of notifications shows."""

    async def serve_nothing(*_arguments: object) -> None:
        return

    patch.setattr("vfiouser_virtio.virtio.device_task.serve_unnotified", serve_nothing)
