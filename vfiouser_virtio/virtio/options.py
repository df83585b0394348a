"""Types of device options, where a plain int or float does not say how it is written.

The parameters of a device class's ``__init__`` that are ``Annotated[type, "help text"]`` are its options: `Size` and
`Duration` are an int and a float to the device, and tell the command line which suffixes to take.
"""

from typing import TYPE_CHECKING, NewType, TypeAlias

# To a type checker they are the int and the float that they are, so that a program can write ``Blk(size=1 << 20)``.
if TYPE_CHECKING:
    Size: TypeAlias = int
    """Bytes; users write a number with an optional suffix K, M, G or T (powers of 1024)."""
    Duration: TypeAlias = float
    """Seconds; users write a number with an optional suffix ms or s."""
else:
    Size = NewType("Size", int)
    Duration = NewType("Duration", float)
