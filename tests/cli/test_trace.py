"""``--trace``: the conversation as lines, from the code that runs without it."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import trio
from support.command import ServeProcess, run_command, serve_process
from support.small_client import cause_warnings, client_of, read_status, status_write

from vfiouser_virtio.protocols.vfio_user import Command

How = tuple[str, ...]


@pytest.fixture(params=[(), ("--processes",)], ids=["one-process", "processes"])
def how(request: pytest.FixtureRequest) -> How:
    options: How = request.param
    return options


async def talk(served: ServeProcess) -> list[bytes]:
    """What two clients get to see, in bytes."""
    seen: list[bytes] = []
    with client_of(served.sockets[0]) as client:
        seen.append((await client.version()).raw)
        await client.send(status_write(client, 3))
        seen += [(await client.call(Command.REGION_READ, struct.pack("<QII", at, 4, 1))).raw for at in (0x14, 0x15)]
        seen.append((await client.call(Command.REGION_READ, struct.pack("<QII", 0, 77, 1))).raw)
        seen.append((await client.call(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0))).raw)
    while True:  # until the server has seen the end of the first
        with client_of(served.sockets[0]) as client:
            try:
                seen.append((await client.version()).raw)
                break
            except (EOFError, ConnectionError):
                await trio.sleep(0.01)
    return seen


async def test_lines_for_people(how: How, tmp_path: Path) -> None:
    async with serve_process(*how, "--device", "rng", folder=tmp_path) as served:
        untraced = await talk(served)
    async with serve_process(*how, "--device", "rng", "--trace=t.txt", folder=tmp_path) as served:
        assert await talk(served) == untraced
        assert await served.terminate() == 0
    assert (tmp_path / "t.txt").stat().st_mode & 0o777 == 0o600
    lines = (tmp_path / "t.txt").read_text().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{6} rng0#\d+ [→←] ", line) for line in lines)
    said = [line.partition(" ")[2] for line in lines if " VERSION " not in line]
    assert said[:8] == [
        "rng0#1 → REGION_WRITE (no reply) BAR4+0x14 device_status = 0x03",
        "rng0#1 → REGION_READ BAR4+0x14 device_status 1 bytes",
        "rng0#1 ← REGION_READ BAR4+0x14 device_status = 0x03",
        "rng0#1 → REGION_READ BAR4+0x15 config_generation 1 bytes",
        "rng0#1 ← REGION_READ BAR4+0x15 config_generation = 0x00",
        "rng0#1 → REGION_READ region 77+0x0 1 bytes",
        "rng0#1 ← REGION_READ refused: EINVAL",
        "rng0#1 → DEVICE_GET_INFO flags=0x0 num_regions=0 num_irqs=0",
    ]
    assert re.match(r"\S+ rng0#2 → VERSION 0.0 ", [line for line in lines if "→ VERSION" in line][1])


async def negotiate(served: ServeProcess) -> None:
    """A driver takes SEG_MAX and BLK_SIZE of a disk, and VERSION_1."""
    with client_of(served.sockets[0]) as client:
        await client.version()

        async def write(offset: int, value: int) -> None:
            await client.call(Command.REGION_WRITE, struct.pack("<QIII", offset, 4, 4, value))

        for word in range(2):
            await write(0x0, word)
            await client.call(Command.REGION_READ, struct.pack("<QII", 0x4, 4, 4))
        for word, bits in enumerate((0x44, 0x1)):
            await write(0x8, word)
            await write(0xC, bits)
        await client.call(Command.REGION_WRITE, struct.pack("<QIIB", 0x14, 4, 1, 0))
        await client.call(Command.REGION_READ, struct.pack("<QII", 0xC, 4, 4))


async def test_features_are_named(how: How, tmp_path: Path) -> None:
    """Those of the device's type, and the reserved ones, whichever 32 of them were selected; a reset selects 0."""
    async with serve_process(*how, "--device", "blk,size=1M,id=disk", "--trace=t.txt", folder=tmp_path) as served:
        await negotiate(served)
        assert await served.terminate() == 0
    lines = (tmp_path / "t.txt").read_text().splitlines()
    said = [line.partition(" disk#1 ")[2] for line in lines if line.endswith(")") and "_feature =" in line]
    assert said[0].startswith("← REGION_READ BAR4+0x4 device_feature = 0x")
    assert "(SEG_MAX, BLK_SIZE, FLUSH, " in said[0]
    assert "VERSION_1" not in said[0]
    assert "(VERSION_1, " in said[1]
    assert said[2:] == [
        "→ REGION_WRITE BAR4+0xc driver_feature = 0x00000044 (SEG_MAX, BLK_SIZE)",
        "→ REGION_WRITE BAR4+0xc driver_feature = 0x00000001 (VERSION_1)",
        "← REGION_READ BAR4+0xc driver_feature = 0x00000000 (none)",
    ]


async def test_features_are_named_for_programs(tmp_path: Path) -> None:
    async with serve_process("--device", "blk,size=1M", "--trace=t.jsonl", folder=tmp_path) as served:
        await negotiate(served)
        assert await served.terminate() == 0
    objects = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    taken = [each["features"] for each in objects if each.get("register") == "driver_feature" and "features" in each]
    assert taken == ["SEG_MAX, BLK_SIZE", "VERSION_1", "none"]


async def test_json_for_programs(how: How, tmp_path: Path) -> None:
    async with serve_process(*how, "--device", "rng", "--trace", "t.jsonl", folder=tmp_path) as served:
        await talk(served)
        assert await served.terminate() == 0
    objects = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert objects[0].items() >= {"device": "rng0", "connection": 1, "direction": "to-device", "id": 1}.items()
    assert objects[0]["command"] == "VERSION"
    assert "max_msg_fds" in objects[0]["json"]
    assert all(each["time"] > 1e9 and each["monotonic"] > 0 for each in objects)
    write = next(each for each in objects if each["command"] == "REGION_WRITE")
    assert {key: write[key] for key in write if key not in ("time", "monotonic", "id")} == {
        "device": "rng0",
        "connection": 1,
        "direction": "to-device",
        "command": "REGION_WRITE",
        "type": "request",
        "no_reply": True,
        "region": "BAR4",
        "offset": 0x14,
        "register": "device_status",
        "count": 1,
        "data": "03",
        "value": 3,
    }
    assert [each["error"] for each in objects if "error" in each] == ["EINVAL"]


async def test_on_stderr_and_at_its_limit(tmp_path: Path) -> None:
    arguments = ["--device", "rng", "--trace", "--trace-limit", "2K", "--log-level", "error"]
    async with serve_process(*arguments, folder=tmp_path) as served:
        with client_of(served.sockets[0]) as client:
            await client.version()
            await cause_warnings(client, 1000)
        assert await served.terminate() == 0
    log = served.log.read_text()
    assert log.splitlines()[-1] == "the trace ends here: it has 2048 bytes (see --trace-limit)"
    assert len(log.encode()) < 3000


async def test_a_trace_that_nobody_reads(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    nobody = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with serve_process("--device", "rng", f"--trace={fifo}", "--log-rate=1", folder=tmp_path) as served:
            with client_of(served.sockets[0]) as client:
                await client.version()
                await cause_warnings(client, 3000)  # 6000 messages of some 80 bytes, and a pipe takes 64 KiB
                assert await read_status(client) == 3
            assert await served.terminate() == 0
    finally:
        os.close(nobody)


async def test_into_what_the_shell_has_opened(how: How, tmp_path: Path) -> None:
    """`--trace=>(gzip >x)`, and a file that others write to."""
    reader, writer = os.pipe()
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    device = f"blk,size=1M,fault=used-never,fault-log=/dev/fd/{log}"
    options = ["--device", device, f"--trace=/dev/fd/{writer}"]
    async with serve_process(*how, *options, folder=tmp_path, pass_fds=(writer, log)) as served:
        os.close(writer)
        os.close(log)
        await talk(served)
        assert await served.terminate() == 0
    async with trio.lowlevel.FdStream(reader) as pipe:
        traced = b"".join([data async for data in pipe]).decode()
    assert "blk0#1 → VERSION" in traced
    assert json.loads((tmp_path / "log").read_text().splitlines()[0])["faults"] == ["used-never"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace=/dev/fd/77"], "--trace=/dev/fd/77: descriptor 77 was not given to this program, or not for writing"),
        (["--trace=/nonexistent/file"], "--trace=/nonexistent/file: No such file or directory"),
        (["--trace=t.txt", "--engine", "libvfio-user"], "--trace: libvfio-user does not show its messages"),
        (["--trace", "--trace-limit=much"], "much"),
    ],
)
def test_mistakes(arguments: list[str], words: str, tmp_path: Path) -> None:
    ended = run_command("serve", "--device", "rng", *arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
