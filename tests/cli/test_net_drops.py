"""What a server has dropped of its guests' frames is in its log when it ends."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from support.command import serve_process

from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.vfio_user import SharedMemory, connect

GROUP = b"\x01\x00\x5e\x00\x00\x01"


@pytest.mark.parametrize("processes", [(), ("--processes",)], ids=["one process", "processes"])
async def test_each_device_has_a_line(processes: tuple[str, ...], tmp_path: Path) -> None:
    """Of a sender with the address of a group, or of another device; with ``-v`` what went through as well."""
    options = ["--device", "net,hub=lan", "--device", "net,hub=lan", "--device", "net", "-v"]
    async with serve_process(*processes, *options, folder=tmp_path) as served:
        async with AsyncExitStack() as stack:
            interfaces = []
            for path in served.sockets:
                memory = stack.enter_context(SharedMemory(16 << 20))
                client = await stack.enter_async_context(connect(path, memory=[memory]))
                interfaces.append((await stack.enter_async_context(bound_pci(client))).driver_data)
            one, other, alone = interfaces
            with trio.fail_after(60):
                await one.send(other.mac + GROUP + b"\x88\xb5" + bytes(46))
                await one.send(b"\xff" * 6 + one.mac + b"\x88\xb5" + bytes(46))
                await other.receive()
                await one.send(b"\xff" * 6 + other.mac + b"\x88\xb5" + bytes(46))
                await other.receive()
                await other.send(b"\xff" * 6 + other.mac + b"\x88\xb5" + bytes(46))
                await one.receive()
                await alone.send(b"\xff" * 6 + alone.mac + b"\x88\xb5" + bytes(46))
        assert await served.terminate() == 0
    log = served.log.read_text()
    lines = {line.partition(" ")[2] for line in log.splitlines() if " dropped " in line}
    assert {
        "WARNING net0: hub lan: dropped 1 from the guest (the sender's address was none)",
        "INFO net2: null: dropped 1 from the guest (there is no network behind it)",
    } <= lines, log
    assert not any("net1" in line for line in lines), log
    assert f"INFO net1: hub lan: {other.mac.hex(':')} was at another device's port before" in log
    assert "net2: null: 1 frames (60 bytes) from the guest, 0 (0 bytes) to it" in log
