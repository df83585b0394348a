"""A DMA message leaves at once, or not at all: what was true when a queue looked must be true when it stores."""

import trio
import trio.testing

from vfiouser_virtio.vfio_user.server.dma_proxy import DmaProxy


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
