"""Benches of parsers: cases from bytes, run, and as the steps of a file, which run again."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from vfiouser_virtio.testing.fuzz.case import Step

Op = tuple[Any, ...]
"""Step of a case while it runs: its name, and its parameters in order."""
Parameters = Mapping[str, Sequence[str]]
"""Names of the parameters of each step, by its name: as they stand in the file of a finding."""
Made = TypeVar("Made")


class ParserBench(ABC, Generic[Made]):
    """Parser with its generator and its oracle. A case does not depend on those that were run before it."""

    @abstractmethod
    def begin(self, chance: random.Random) -> None:
        """A new batch: prepare what its cases have in common."""

    @abstractmethod
    def make(self, draw: bytes) -> Made:
        """A case of the batch, of these bytes."""

    @abstractmethod
    def run(self, made: Made) -> None:
        """Play a case. Raises Found, or what a parser raises that it may not."""

    @abstractmethod
    def steps(self, made: Made) -> list[Step]:
        """The same case as steps, with all that it needs."""

    @abstractmethod
    def of_steps(self, steps: Sequence[Step]) -> Made:
        """The other way. Raises ValueError for what is no case."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and file descriptors."""


def as_steps(ops: Sequence[Op], parameters: Parameters) -> list[Step]:
    """Steps with names, bytes in hex."""
    return [
        {"do": op[0]}
        | {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in zip(parameters[op[0]], op[1:], strict=True)
        }
        for op in ops
    ]


def as_ops(steps: Sequence[Step], parameters: Parameters) -> list[Op]:
    """The other way. Raises ValueError."""
    ops = []
    for step in steps:
        names = parameters.get(step["do"])
        if names is None or {"do", *names} != step.keys():
            raise ValueError(f"step {step}: expected one of {', '.join(parameters)}, with all of its parameters")
        values = (step[name] for name in names)
        ops.append(
            (
                step["do"],
                *(bytes.fromhex(each) if name == "data" else each for name, each in zip(names, values, strict=True)),
            )
        )
    return ops
