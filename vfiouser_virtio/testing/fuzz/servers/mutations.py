"""Mutations of a good conversation: fields, sizes, file descriptors, order, and the way bytes are sent."""

import json
from collections.abc import Callable
from random import Random

from vfiouser_virtio.testing.fuzz import fd_kinds, messages
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.message_step import HEADS, command_number, payload_of
from vfiouser_virtio.testing.fuzz.servers.grammar import any_message, conversation
from vfiouser_virtio.testing.fuzz.servers.shown import ShownDevice
from vfiouser_virtio.testing.fuzz.values import mutated, number
from vfiouser_virtio.testing.raw.client import HEADER_SIZE, MAX_MESSAGE_SIZE, raw_message

_FLAGS = (0x10, 0x10, 0x10, 0x20, 0x40, 0x80000000, 1, 0x21, 2, 0xF)
_FDS = (1, 1, 2, 8, 16, 17, 40, 253)
_ODD: tuple[object, ...] = (0, 1, -1, 2**64, 2**31, 1.5, True, None, "x", [], {}, 16, 4096, 1 << 20)


def generate(seed: int, index: int, shown: ShownDevice) -> Case:
    """The case that these numbers stand for; the same one each time, for a server that shows the same."""
    random = Random(f"conversation:{seed}:{index}")
    case = Case("conversation", "socket", hello=False, origin=f"conversation:{seed}:{index}")
    steps = conversation(random, shown)
    for _ in range(random.choice((0, 1, 1, 2, 2, 3, 4, 6, 10))):
        mutation, _ = random.choices(_MUTATIONS, [weight for _, weight in _MUTATIONS])[0]
        mutation(random, steps, shown)
    case.steps = steps
    return case


def _message(random: Random, steps: list[Step]) -> Step | None:
    found = [step for step in steps if step["do"] == "message"]
    return random.choice(found) if found else None


def _field(random: Random, steps: list[Step], shown: ShownDevice) -> None:
    """One field has another value: at a boundary, near its own, or near a size that the server has shown."""
    step = _message(random, steps)
    if step is None or not step.get("fields"):
        return
    known = HEADS[command_number(step["command"])]
    name = random.choice(list(known))
    _, size = known[name]
    before = step["fields"].get(name, 0)
    sizes = [*shown.regions.values(), *shown.irqs.values()]
    value = random.choice(
        (
            number(random, 8 * size),
            number(random, 8 * size),
            random.choice(sizes or [1]) + random.choice((-1, 0, 1)),
            before + random.choice((-1, 1, 4, 0x1000)),
            -before,
            (1 << 8 * size) - max(before, 1),
            before ^ 1 << random.randrange(8 * size),
        )
    )
    step["fields"] = {**step["fields"], name: value & (1 << 8 * size) - 1}


def _data(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """What follows the fields is longer, shorter, or other bytes."""
    if (step := _message(random, steps)) is not None:
        step["data"] = mutated(random, bytes.fromhex(step.get("data", ""))).hex()


def _short(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """The payload ends early; its header says so."""
    if (step := _message(random, steps)) is not None:
        body = payload_of(step)
        for key in ("fields", "text", "data"):
            step.pop(key, None)
        step["body"] = body[: random.randint(0, max(len(body) - 1, 0))].hex()


def _size(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """The header lies about the size."""
    if (step := _message(random, steps)) is not None:
        length = HEADER_SIZE + len(payload_of(step))
        step["size"] = random.choice(
            (0, 1, 15, 16, max(length - 1, 0), length + 1, length + 16, MAX_MESSAGE_SIZE + 1, 0x7FFFFFFF, 0xFFFFFFFF)
        )


def _header(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Other flags, an error in a request, an id that is in use, a command that does not exist."""
    if (step := _message(random, steps)) is not None:
        choice = random.randrange(4)
        if choice == 0:
            step["flags"] = random.choice(_FLAGS)
        elif choice == 1:
            step["error"] = number(random, 32)
        elif choice == 2:
            step["id"] = random.choice((0, 1, 0xFFFF))
        elif "fields" not in step:
            step["command"] = random.choice((0, 19, 20, 0x7F, 0xFFFF))


def _fds(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """File descriptors of another kind, too many of them, none, or where none belong."""
    if (step := _message(random, steps)) is not None:
        if step.get("fds") and random.random() < 0.5:
            fds = list(step["fds"])
            if random.random() < 0.3:
                step.pop("fds")
                return
            fds[random.randrange(len(fds))] = random.choice(fd_kinds.KINDS)
            step["fds"] = fds
        else:
            step["fds"] = [random.choice(fd_kinds.KINDS) for _ in range(random.choice(_FDS))]


def _version(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """VERSION with other capabilities, or no JSON at all."""
    step = next((step for step in steps if step.get("command") == "VERSION" and "fields" in step), None)
    if step is None:
        return
    keys = (
        "max_msg_fds",
        "max_data_xfer_size",
        "pgsizes",
        "max_dma_maps",
        "write_multiple",
        "twin_socket",
        "migration",
    )
    offered: dict[str, object] = {key: random.choice(_ODD) for key in keys if random.random() < 0.4}
    step["text"] = random.choice(
        (
            json.dumps({"capabilities": offered}) + "\0",
            json.dumps({"capabilities": random.choice(_ODD)}) + "\0",
            json.dumps(random.choice(_ODD)) + "\0",
            json.dumps({"capabilities": offered}),
            "[" * random.choice((10, 1000, 100000)),
            "{}\0" + "x" * random.choice((1, 4000)),
            "",
        )
    )


def _cuts(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """A message in many writes."""
    if (step := _message(random, steps)) is not None:
        length = HEADER_SIZE + len(payload_of(step))
        step["cuts"] = sorted(random.randint(1, max(length - 1, 1)) for _ in range(random.randint(1, 4)))


def _joined(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Several messages in one write."""
    first = random.randrange(len(steps))
    for step in steps[first : first + random.randint(1, 8)]:
        if step["do"] == "message":
            step["later"] = True


def _pipelined(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Replies are not waited for."""
    first = random.randrange(len(steps))
    for step in steps[first : first + random.randint(1, 8)]:
        if step["do"] == "message":
            step["wait"] = False


def _repeated(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """The same message again, many times at times."""
    at = random.randrange(len(steps))
    steps[at:at] = [dict(steps[at]) for _ in range(random.choice((1, 1, 2, 8, 40)))]


def _moved(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Another order."""
    steps.insert(random.randrange(len(steps)), steps.pop(random.randrange(len(steps))))


def _left_out(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    if len(steps) > 1:
        del steps[random.randrange(len(steps))]


def _foreign(random: Random, steps: list[Step], shown: ShownDevice) -> None:
    """A message out of nowhere: a good one, or one of those that our own server gets."""
    step = messages.message(random) if random.random() < 0.5 else any_message(random, shown)
    steps.insert(random.randint(0, len(steps)), step | {"id": random.randrange(0x100, 0x10000)})


def _junk(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Bytes that are no message, or a part of one, after which the client may be gone."""
    data = random.randbytes(random.choice((1, 15, 16, 17, 100)))
    if random.random() < 0.6 and (step := _message(random, steps)) is not None:
        whole = raw_message(command_number(step["command"]), payload_of(step), message_id=7)
        data = whole[: random.randint(1, max(len(whole) - 1, 1))]
    at = random.randint(0, len(steps))
    after: list[Step] = [{"do": random.choice(("hang_up", "half_close"))}] if random.random() < 0.6 else []
    steps[at:at] = [{"do": "raw", "data": data.hex()}, *after]


def _hang_up(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """The client is gone, with replies on their way, and comes back."""
    at = random.randint(1, len(steps))
    if steps[at - 1]["do"] == "message" and random.random() < 0.7:
        steps[at - 1]["wait"] = False
    back = [dict(steps[0])] if random.random() < 0.7 else []
    steps[at:at] = [{"do": "hang_up"}, *back]


def _deaf(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Replies are not read any more, however many there are."""
    at = random.randint(1, len(steps))
    many = [dict(step) for step in steps[at:] if step["do"] == "message"] * random.choice((1, 4))
    steps[at:] = [{"do": "deaf"}, *many[:200]]


def _second(random: Random, steps: list[Step], _shown: ShownDevice) -> None:
    """Another client meanwhile."""
    for step in [dict(each) for each in steps[: random.randint(1, 4)]]:
        steps.insert(random.randint(1, len(steps)), step | {"client": 1, "wait": False})


_MUTATIONS: tuple[tuple[Callable[[Random, list[Step], ShownDevice], None], int], ...] = (
    (_field, 30),
    (_data, 6),
    (_short, 3),
    (_size, 2),
    (_header, 5),
    (_fds, 10),
    (_version, 3),
    (_cuts, 3),
    (_joined, 4),
    (_pipelined, 4),
    (_repeated, 4),
    (_moved, 4),
    (_left_out, 2),
    (_foreign, 6),
    (_junk, 3),
    (_hang_up, 4),
    (_deaf, 1),
    (_second, 2),
)
"""Each with how often it is taken, in proportion to the others."""
