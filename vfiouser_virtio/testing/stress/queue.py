"""Device process with a whole `virtio.Virtqueue` in trio: kicks arrive at one task, chains are served by others."""

import os
import random
from typing import Literal

import trio

from vfiouser_virtio.testing.stress.device import check, guest_memory, serve
from vfiouser_virtio.testing.stress.game import Score, Table
from vfiouser_virtio.virtio import Chain, Queue, Stop, Virtqueue
from vfiouser_virtio.vring import RingFeatures

# Longer than any task here sleeps, in seconds.
_FOREVER = 1.0


def work_in_queue(table: Table) -> None:
    """Serve the queue until the game is over. Raises Failure for what a correct driver cannot do."""
    trio.run(_work, table, instruments=[_Sleep(table)])


async def _work(table: Table) -> None:
    rng = random.Random(~table.game.seed)
    virtqueue = _set_up(table, rng.choice(("adaptive", "off")))
    queue = Queue(virtqueue.index, virtqueue.max_size)
    queue.attach(virtqueue)
    table.device_side = virtqueue
    number = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_kicks, table, virtqueue, nursery.cancel_scope)
        async for chain in queue:
            check(chain, number)
            if rng.random() < 0.2:
                nursery.start_soon(_serve_later, chain, number, rng.choice((0.0, 0.0, 50e-6)))
            else:
                serve(chain, number)
            number += 1
            table.board[Score.TAKEN] = number


def _set_up(table: Table, poll: Literal["adaptive", "off"]) -> Virtqueue:
    """What a device core does until DRIVER_OK."""
    game, vq = table.game, table.vq
    queue = Virtqueue(
        vq.index,
        1 << (game.size - 1).bit_length(),
        guest_memory(table),
        interrupt=lambda: os.eventfd_write(table.call, 1),
        failed=_give_up,
        warn=print,
        poll=poll,
    )
    queue.negotiate(RingFeatures.of(game.features))
    queue.configure(size=game.size, desc=vq.desc, driver=vq.driver, device=vq.device)
    queue.enable()
    queue.start(Stop.NOT_DRIVER_OK)
    return queue


def _give_up(error: Exception) -> None:
    raise error


async def _kicks(table: Table, queue: Virtqueue, end: trio.CancelScope) -> None:
    while not table.board[Score.OVER]:
        await trio.lowlevel.wait_readable(table.kick)
        os.eventfd_read(table.kick)
        queue.kick()
    end.cancel()


async def _serve_later(chain: Chain, number: int, delay: float) -> None:
    await trio.sleep(delay)
    serve(chain, number)


class _Sleep(trio.abc.Instrument):
    """Instrument that tells the score board when the whole process has nothing to do, and no time to wait for."""

    def __init__(self, table: Table) -> None:
        self.board = table.board

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 0:
            self.board[Score.DEVICE_ASLEEP] = timeout > _FOREVER
            self.board[Score.DEVICE_SLEEPS] += 1

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio says so
        self.board[Score.DEVICE_ASLEEP] = 0
