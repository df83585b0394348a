"""Checks of a `PciDevice` class when it is defined: mistakes that would be silent, or seen far away from their line."""

import inspect
from collections.abc import Iterator
from typing import get_args

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.hook_checks import coroutine_mistakes
from vfiouser_virtio.pci.accesses import UnmodelledPolicy
from vfiouser_virtio.pci.bar_part import BarPart
from vfiouser_virtio.pci.bar_space import bar
from vfiouser_virtio.pci.capabilities import Capability
from vfiouser_virtio.pci.extended_capabilities import ExtendedCapability
from vfiouser_virtio.pci.fields import BitField
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.pci.irq import IrqsDeclaration

_HOOKS = ("reset", "soft_reset", "unmodelled_read", "unmodelled_write", "confine", "close")


def check_class_body(cls: type) -> None:
    """Raises AuthorError, which names the class and the attribute, for what its body cannot mean."""
    body = dict(vars(cls))
    for mistake in (*_misplaced(cls, body), *_attributes(body), *coroutine_mistakes(cls, _HOOKS)):
        raise AuthorError(f"{cls.__name__}.{mistake}")


def check_bank_body(cls: type) -> None:
    """The same of a `Bank`."""
    for mistake in _misplaced(cls, dict(vars(cls))):
        raise AuthorError(f"{cls.__name__}.{mistake}")


def _misplaced(cls: type, body: dict[str, object]) -> Iterator[str]:
    for name, value in body.items():
        if isinstance(value, BitField):
            yield f"{name}: a field is declared in a subclass of Register, and lies in no BAR by itself"
        elif (
            inspect.isclass(value)
            and issubclass(value, BarPart)
            # A class that is defined in this body is meant as one.
            and not value.__qualname__.startswith(f"{cls.__qualname__}.")
        ):
            yield f"{name}: {value.__name__} is a class: write {name} = {value.__name__}(offset)"
        elif value is bar:
            yield f"{name}: bar is a function: write {name} = bar(index, size=…)"


def _attributes(body: dict[str, object]) -> Iterator[str]:
    if not isinstance(body.get("irq", _AN_IRQ), IrqsDeclaration):
        yield "irq: expected interrupts(…)"
    if "identity" in body and not isinstance(body["identity"], Identity | property):
        yield f"identity: {body['identity']!r:.60}: expected Identity(vendor=…, device=…)"
    if not isinstance(body.get("name", ""), str):
        yield f"name: {body['name']!r:.60}: expected text"
    if "unmodelled" in body and body["unmodelled"] not in get_args(UnmodelledPolicy):
        yield f"unmodelled = {body['unmodelled']!r:.60}: expected one of {', '.join(get_args(UnmodelledPolicy))}"
    if "capabilities" in body:
        yield from _capabilities(body["capabilities"])


def _capabilities(declared: object) -> Iterator[str]:
    if isinstance(declared, Capability | ExtendedCapability):
        yield "capabilities: this is one capability: write (…,), with a comma behind it"
    elif not isinstance(declared, tuple):
        yield f"capabilities: {declared!r:.60}: expected a tuple of Capability and ExtendedCapability"
    else:
        for each in declared:
            if not isinstance(each, Capability | ExtendedCapability):
                yield f"capabilities: {each!r:.60} in it: expected Capability or ExtendedCapability"
            elif len(each.data) < 2:
                yield f"capabilities: one of {len(each.data)} bytes: its id and where the next one is take 2"


_AN_IRQ = IrqsDeclaration(1, None, False, 1)
