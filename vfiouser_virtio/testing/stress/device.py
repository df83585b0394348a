"""Device process of the stress test: takes buffers, checks them, gives them back in any order, polls, sleeps."""

import os
import random
from itertools import cycle

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.stress.game import (
    NUMBERS,
    RAM,
    Failure,
    Score,
    Table,
    checksum,
    think,
    thoughts,
    vain_looks,
)
from vfiouser_virtio.vring import Chain, RingFeatures, make_ring, ring_areas


def guest_memory(table: Table) -> GuestMemory:
    """The driver's memory as a device has it."""
    memory = GuestMemory()
    assert table.memory.fd is not None
    fd = os.dup(table.memory.fd)
    memory.map(table.memory.address, RAM, readable=True, writable=True, fd=fd, offset=0)
    return memory


def check(chain: Chain, number: int) -> None:
    """Raises Failure unless this is what the driver has put into the buffer of this number."""
    found = NUMBERS.unpack(chain.readable.read())
    if found != (number, checksum(number)):
        raise Failure(f"buffer {number} came with {found[0]}, {found[1]:#x}")


def serve(chain: Chain, number: int) -> None:
    """Answer a buffer."""
    if chain.writable.length:
        chain.writable.write(NUMBERS.pack(checksum(number), number))
    chain.complete()


def work(table: Table) -> None:
    """Serve the bare ring until the game is over. Raises Failure for what a correct driver cannot do."""
    game, vq, board = table.game, table.vq, table.board
    rng = random.Random(~game.seed)
    memory = guest_memory(table)
    features = RingFeatures.of(game.features)
    ring = make_ring(game.size, memory, features)
    areas = ring_areas(game.size, features, vq.desc, vq.driver, vq.device)
    ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
    table.device_side = ring
    turns, looks = thoughts(rng), vain_looks(rng)
    limits = cycle([rng.choice((1, 2, 64, 64)) for _ in range(4079)])
    number = rounds = 0
    looks_left = next(looks)
    held: list[tuple[Chain, int]] = []
    while True:
        rounds += 1
        for chain in ring.pop(next(limits)):
            check(chain, number)
            held.append((chain, number))
            number += 1
        if held:
            board[Score.TAKEN] = number
            if rounds % 2:
                ring.suppress_notifications()
            # Some wait for the next round, so that others overtake them; the last ones only until nothing new comes.
            rng.shuffle(held)
            keep = rounds % 3 if len(held) > 2 else 0
            for chain, of in held[keep:]:
                serve(chain, of)
            del held[keep:]
            think(next(turns))
            if ring.publish():
                os.eventfd_write(table.call, 1)
        elif board[Score.OVER]:
            return
        elif looks_left:
            looks_left -= 1
        else:
            # Believe what the ring says: nothing has come, and a notification will.
            if not ring.request_notification():
                table.sleep(table.kick, Score.DEVICE_ASLEEP, Score.DEVICE_SLEEPS)
            looks_left = next(looks)
