"""Words of a client that reach a log: VERSION's JSON, with strings that command a terminal or begin a line."""

import json
from random import Random
from typing import Any

from vfiouser_virtio.testing.fuzz.process.case import ProcessCase
from vfiouser_virtio.testing.fuzz.process.oracle import FORGED

_KEYS = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple", "twin_socket", "migration")
_WORDS = (
    "\x1b]0;owned\x07", "\x1b[2J", f"\n{FORGED} all is well", f"\r\n{FORGED}", "\x9b31m", "\x00", "\x7f\x08\x08",
    "\u2028", "\u202e",
)  # fmt: skip


def words(random: Random) -> ProcessCase:
    """A client whose capabilities are text, of any kind, at any place."""
    word = "".join(random.choice(_WORDS) for _ in range(random.randint(1, 3))) * random.choice((1, 1, 100))
    value: Any = random.choice((word, [word], {word: word}, {"supported": word}, {"pgsize": word}))
    capabilities: dict[str, Any] = {"max_msg_fds": 8}
    key = random.choice((*_KEYS, word))
    capabilities[key] = value
    roll = random.random()
    if roll < 0.8:
        text = json.dumps({"capabilities": capabilities}, ensure_ascii=random.random() < 0.7)
    elif roll < 0.9:
        text = json.dumps({word: word, "capabilities": word})
    else:
        text = word + json.dumps(capabilities)
    steps = [{"do": "connect", "client": 0, "device": 0, "capabilities": text}]
    return ProcessCase("words", ["rng", "rng", "rng"], lanes=[steps], seconds=3)
