"""The messages of a client as a parser to be fuzzed: `message_cases` on a `message_bench`."""

import random
from collections.abc import Sequence

from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.parsers.bench import Op, ParserBench, as_ops, as_steps
from vfiouser_virtio.testing.fuzz.parsers.message_bench import PARAMETERS, MessageBench
from vfiouser_virtio.testing.fuzz.parsers.message_cases import MessageCases


class Messages(ParserBench[list[Op]]):
    """Messages to a server, after VERSION."""

    def __init__(self) -> None:
        self._bench = MessageBench()
        self._cases: MessageCases

    def begin(self, chance: random.Random) -> None:
        self._cases = MessageCases(chance)

    def make(self, draw: bytes) -> list[Op]:
        return self._cases.make(draw)

    def run(self, made: list[Op]) -> None:
        self._bench.run(made)

    def steps(self, made: list[Op]) -> list[Step]:
        return as_steps(made, PARAMETERS)

    def of_steps(self, steps: Sequence[Step]) -> list[Op]:
        return as_ops(steps, PARAMETERS)

    def close(self) -> None:
        self._bench.close()
