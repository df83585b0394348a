"""``--audit``: what drivers did, on stderr or in a file, and the exit status."""

import json
import os
from pathlib import Path

import pytest
import trio
from support.command import run_command, serve_process

from vfiouser_virtio.guest import bound_pci
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports.pci import VIRTIO_BAR
from vfiouser_virtio.vfio_user import SharedMemory, connect


async def drive(path: str, *, badly: bool) -> None:
    """Our own driver, which does all right, and perhaps one thing more."""
    with SharedMemory(16 << 20) as memory:
        async with connect(path, memory=[memory]) as client, bound_pci(client):
            if badly:
                at, size = COMMON_CFG_OFFSETS["queue_enable"]
                await client.region_write(VIRTIO_BAR, at, bytes(size))


@pytest.mark.parametrize("device", ["rng", "blk,size=1M", "console,chardev=null", "balloon", "input,kind=mouse", "net"])
async def test_our_own_driver_is_not_accused(device: str, tmp_path: Path) -> None:
    async with serve_process("--audit", "--once", "--device", device, folder=tmp_path) as server:
        await drive(server.sockets[0], badly=False)
        assert await server.wait() == 0
        assert server.log.read_text().endswith("audit of 1 device: no broken rule\n")


async def test_what_was_broken_is_said(tmp_path: Path) -> None:
    async with serve_process("--audit", "--once", "--device", "rng", folder=tmp_path) as server:
        await drive(server.sockets[0], badly=True)
        assert await server.wait() == 8
        assert server.log.read_text().endswith(
            "rng0: the driver broke queue/enable-zero, MUST, once (driver run 1); "
            "virtio 1.4, 4.1.4.3.2 Common configuration structure layout\n"
            "    rule: 0 is never written to queue_enable.\n"
            "    seen: queue 0: wrote queue_enable 0x0\n"
            "audit of 1 device: 1 MUST and 0 SHOULD rules of virtio 1.4 broken\n"
        )


async def test_a_file_for_programs(tmp_path: Path) -> None:
    async with serve_process("--audit=a.json", "--device", "rng,id=dice", folder=tmp_path) as server:
        for _ in range(2):
            await drive(server.sockets[0], badly=True)
        assert await server.terminate() == 8
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["must-broken"] == 1
    [device] = found["devices"]
    [finding] = device["findings"]
    assert device["device"] == "dice"
    assert finding["rule"] == "queue/enable-zero"
    assert finding["keyword"] == "MUST"
    assert finding["count"] == 2
    assert finding["runs"] == [1, 2]


@pytest.mark.parametrize("sandbox", [(), ("--sandbox=best-effort",)])
async def test_a_pipe_that_the_shell_has_made(sandbox: tuple[str, ...], tmp_path: Path) -> None:
    """Open from the start, so that a sandbox is no matter, and its reader sees one report and the end."""
    reader, writer = os.pipe()
    arguments = [*sandbox, f"--audit=/dev/fd/{writer}", "--once", "--device", "rng"]
    async with serve_process(*arguments, folder=tmp_path, pass_fds=(writer,)) as server:
        os.close(writer)
        await drive(server.sockets[0], badly=False)
        assert await server.wait() == 0
    async with trio.lowlevel.FdStream(reader) as pipe:
        assert b"".join([data async for data in pipe]) == b"audit of 1 device: no broken rule\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--audit=/nonexistent/x"], "--audit=/nonexistent/x: No such file"), (["--audit", "--processes"], "--processes")],
)
def test_usage(arguments: list[str], words: str) -> None:
    ended = run_command("serve", *arguments, "--device", "rng")
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
