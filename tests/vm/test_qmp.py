"""The client of QEMU's machine protocol, with the test as QEMU."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from vfiouser_virtio.vm.qmp import QmpClient, QmpClosedError, QmpError


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[QmpClient, trio.SocketStream]]:
    ours, theirs = socket.socketpair()
    client = QmpClient(ours)
    qemu = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    async with qemu, trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await qemu.send_all(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        yield client, qemu
        nursery.cancel_scope.cancel()
    client.close()


async def receive(qemu: trio.SocketStream) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        line += await qemu.receive_some()
    message: dict[str, Any] = json.loads(line)
    return message


async def test_answers_find_their_command_and_events_are_kept() -> None:
    async with connected() as (client, qemu):
        results: dict[str, object] = {}

        async def ask(command: str) -> None:
            results[command] = await client.execute(command, some_name=1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a")
            first = await receive(qemu)
            nursery.start_soon(ask, "b")
            second = await receive(qemu)
            assert first["execute"] == "a"
            assert first["arguments"] == {"some-name": 1}
            # In the other order, with an event between, and cut in the middle of a line.
            text = json.dumps({"return": "for b", "id": second["id"]}) + '\r\n{"event": "RESET", "data": {}}\r\n'
            text += json.dumps({"return": "for a", "id": first["id"]}) + "\r\n"
            await qemu.send_all(text[:30].encode())
            await trio.testing.wait_all_tasks_blocked()
            await qemu.send_all(text[30:].encode())
        assert results == {"a": "for a", "b": "for b"}
        assert (await client.wait_event("RESET"))["event"] == "RESET"
        assert list(client.events) == []


async def test_refusal() -> None:
    async with connected() as (client, qemu):

        async def refuse() -> None:
            request = await receive(qemu)
            error = {"class": "GenericError", "desc": "no disk"}
            await qemu.send_all(json.dumps({"error": error, "id": request["id"]}).encode() + b"\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(QmpError, match="no disk") as caught:
                await client.execute("eject")
        assert caught.value.kind == "GenericError"


async def test_end_of_qemu_wakes_whoever_waits() -> None:
    async with connected() as (client, qemu):

        async def leave() -> None:
            await receive(qemu)
            await qemu.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            with pytest.raises(QmpClosedError, match="during query-status"):
                await client.execute("query-status")
        with pytest.raises(QmpClosedError, match="without SHUTDOWN"):
            await client.wait_event("SHUTDOWN")
        with pytest.raises(QmpClosedError):
            await client.execute("query-status")
