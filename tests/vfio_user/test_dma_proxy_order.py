"""A DMA message leaves at once, or not at all: what was true when a queue looked must be true when it stores."""

import trio
import trio.testing

from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command
from vfiouser_virtio.vfio_user.server.dma_proxy import DmaProxy
from vfiouser_virtio.vfio_user.wire.connection import Message


async def test_nothing_happens_between_the_look_of_the_caller_and_the_message() -> None:
    events: list[str] = []
    memory = DmaProxy("client", lambda data: events.append("sent"), 1 << 20)

    async def store() -> None:
        events.append("looked")
        await memory.dma_write(0x1000, b"used ring")

    async def reset() -> None:
        events.append("reset")

    async with trio.open_nursery() as nursery:
        for _ in range(8):  # trio runs the tasks of a round in any order
            nursery.start_soon(store)
            nursery.start_soon(reset)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert all(events[at + 1] == "sent" for at, event in enumerate(events) if event == "looked")


async def test_who_was_cancelled_while_waiting_for_room_sends_nothing() -> None:
    sent: list[bytes] = []
    memory = DmaProxy("client", sent.append, 1 << 20)
    async with trio.open_nursery() as nursery:
        for _ in range(3):  # the third does not fit into the window
            nursery.start_soon(memory.dma_write, 0x1000, bytes(1 << 20))
        await trio.testing.wait_all_tasks_blocked()
        assert len(sent) == 2
        nursery.cancel_scope.cancel()
        memory.close()  # makes room in the same moment
    assert len(sent) == 2


async def test_what_is_cancelled_while_it_is_being_woken_up_sends_no_more() -> None:
    """A reset comes with the answer to a message: the next one would store to a guest whose reset has been answered."""
    sent: list[bytes] = []
    proxy = DmaProxy("a client", sent.append, 4)

    async def write() -> None:
        await proxy.dma_write(0x1000, bytes(4))
        await proxy.dma_write(0x2000, bytes(4))

    for task in (write, lambda: proxy.dma_write(0x1000, bytes(8))):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            await trio.testing.wait_all_tasks_blocked()
            message_id = HEADER_CODEC.unpack_from(sent[-1])[0]
            proxy.reply(Message(message_id, Command.DMA_WRITE, 0, 0, b""))
            nursery.cancel_scope.cancel()
    assert len(sent) == 2, "one of each"
