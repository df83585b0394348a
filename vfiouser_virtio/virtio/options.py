"""Types of device options, where a plain int or float does not say how it is written.

The parameters of a device class's ``__init__`` that are ``Annotated[type, "help text"]`` are its options: `Size` and
`Duration` are an int and a float to the device, and tell the command line which suffixes to take.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NewType, TypeAlias

# To a type checker they are the int and the float that they are, so that a program can write ``Blk(size=1 << 20)``.
if TYPE_CHECKING:
    Size: TypeAlias = int
    """Bytes; users write a number with an optional suffix K, M, G or T (powers of 1024)."""
    Duration: TypeAlias = float
    """Seconds; users write a number with an optional suffix ms or s."""
else:
    Size = NewType("Size", int)
    Duration = NewType("Duration", float)


class OneOf(NamedTuple):
    """Annotation of a parameter that takes an object of one of several classes, such as a back end.

    The parameter is an option that says which, by name. Those of that class's constructor are options of the device as
    well, and need be of one kind where several classes have them; one with the name of its class says which by itself:
    ``hub=lan`` is ``netdev=hub,hub=lan``. The object is made when the device is made, right before it.
    """

    classes: Mapping[str, Callable[..., Any]]
    """By name, as users write it."""
    shares: tuple[str, ...] = ()
    """Parameters of the device that are given to the class's constructor as well, where it has them."""


class Making:
    """An argument that is still to be made: a class and the options that the user has given for it."""

    __slots__ = ("arguments", "constructor")

    def __init__(self, constructor: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self.constructor = constructor
        self.arguments = dict(arguments)

    def __call__(self) -> Any:
        """Make it. Raises what the class's constructor raises."""
        return self.constructor(**self.arguments)
