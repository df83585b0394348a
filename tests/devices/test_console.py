"""The console device through its rings: data both ways, control messages, resets, and what no good driver does."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from support.console_driver import EMERG_WRITE, MULTIPORT, PORT_READY, SIZE, VERSION_1, Run, control, read_exactly, tell

from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.testing.driver import running

# ---- one plain console ---------------------------------------------------------------------------------------------


async def test_a_plain_console_has_two_queues_and_no_control(run: Run) -> None:
    chardev, stream = pair()
    console = Console(chardev=[chardev])
    assert console.features == SIZE | EMERG_WRITE
    assert len(console.queues) == 2
    async with stream, run(console) as driver:
        assert (driver.config(0, 2), driver.config(2, 2), driver.config(4, 4)) == (80, 24, 1)
        assert (await driver.request([b"login", b": "], queue=1)).written == 0
        assert await read_exactly(stream, 7) == b"login: "
        token = driver.add(0, [], [3, 100])
        driver.kick(0)
        await stream.send_all(b"root\r")
        written, data = await driver.wait(0, token)
        assert (written, b"".join(data)[:5]) == (5, b"root\r")


async def test_a_driver_without_multiport_has_port_0(run: Run) -> None:
    (first, first_end), (second, second_end) = pair(), pair()
    async with first_end, second_end, run(Console(chardev=[first, second]), features=VERSION_1) as driver:
        await driver.request([b"hello"], queue=1)
        assert await read_exactly(first_end, 5) == b"hello"
        await first_end.send_all(b"abc")
        assert (await driver.request([], [16], queue=0)).data[0][:3] == b"abc"


async def test_input_waits_for_buffers_and_loses_nothing(run: Run) -> None:
    chardev, stream = pair()
    async with stream, run(Console(chardev=[chardev])) as driver, trio.open_nursery() as nursery:
        data = os.urandom(200_000)
        nursery.start_soon(stream.send_all, data)
        await trio.testing.wait_all_tasks_blocked(0.02)
        got = b""
        while len(got) < len(data):
            used = await driver.request([], [1000, 777], queue=0)
            got += b"".join(used.data)[: used.written]
        assert got == data


async def test_output_waits_for_the_host_and_loses_nothing(run: Run) -> None:
    chardev, stream = pair()
    async with stream, run(Console(chardev=[chardev])) as driver:
        chunks = [os.urandom(150_000) for _ in range(8)]
        tokens = [driver.add(1, [chunk]) for chunk in chunks]
        driver.kick(1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not driver.is_used(1, tokens[-1])
        assert await read_exactly(stream, 8 * 150_000) == b"".join(chunks)
        assert (await driver.wait(1, tokens[-1])).written == 0


async def test_emergency_write_at_any_time(run: Run) -> None:
    chardev, stream = pair()
    async with stream, run(Console(chardev=[chardev]), probe=False) as driver:
        for byte in b"oops":
            driver.core.write_config(8, struct.pack("<I", 0xABCDEF00 | byte))
        assert await read_exactly(stream, 4) == b"oops"
        assert driver.status == 0
        driver.core.write_config(0, b"\xff\xff\xff\xff")  # the size is not the driver's to write
        assert driver.config(0, 2) == 80
        driver.probe()
        driver.core.write_config(8, struct.pack("<I", ord("!")))
        assert await read_exactly(stream, 1) == b"!"


async def test_resize_is_told_with_an_interrupt(run: Run) -> None:
    chardev, stream = pair()
    console = Console(chardev=[chardev])
    async with stream, run(console) as driver:
        console.resize(132, 50)
        assert (driver.config(0, 2), driver.config(2, 2)) == (132, 50)
        assert driver.config_interrupts == 1
        with pytest.raises(ValueError, match="70000×1"):
            console.resize(70000, 1)


async def test_host_sides_survive_resets(run: Run) -> None:
    chardev, stream = pair()

    async def read_to(marker: bytes) -> None:
        """What was under way at the reset may come before it."""
        data = b""
        while not data.endswith(marker):
            data += await stream.receive_some(100_000)
        assert set(data.removesuffix(marker)) <= {ord("x")}

    async with stream, run(Console(chardev=[chardev])) as driver:
        await stream.send_all(b"typed early")
        for number in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_to, b"boot %d;" % number)
                await driver.request([b"boot %d;" % number], queue=1)
            driver.add(1, [b"x" * 500_000])  # the host does not read: in flight at the reset
            driver.kick(1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await driver.reset()
            driver.probe()
        assert (await driver.request([], [100], queue=0)).data[0][:11] == b"typed early"


# ---- mistakes of the user ------------------------------------------------------------------------------------------


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    options: dict[str, Any]
    for options, message in (
        ({"chardev": []}, "0 ports"),
        ({"chardev": ["null"] * 32}, "1 to 31"),
        ({"chardev": ["nul"]}, "did you mean null"),
        ({"chardev": ["null"], "name": ["a", "b"]}, "2 names for 1 ports"),
        ({"chardev": ["null"] * 2, "name": ["a", "a"]}, "the same name"),
        ({"chardev": ["null"], "name": ["a/b"]}, "cannot be a file name"),
        ({"chardev": ["null"], "console": ["1"]}, "console=1 is not the number of a port, 0 to 0"),
        ({"chardev": ["null"], "console": ["x"]}, "console=x is not"),
        ({"chardev": ["null"], "cols": 0}, "cols=0 is not 1 to 65535"),
    ):
        with pytest.raises(ConfigError, match=message):
            Console(**options)
    with pytest.raises(DeviceError, match="Is a directory"):
        Console(chardev=[f"unix:{tmp_path}/s", f"file:{tmp_path}"])
    assert not (tmp_path / "s").exists()  # what was opened before the mistake was found is closed


def test_the_default_is_a_pty() -> None:
    console = Console()
    assert console.describe().startswith("pty /dev/pts/")
    console.close()


async def test_what_a_host_side_has_to_say_begins_with_the_device(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    console = Console(chardev=[f"file:{tmp_path}/small", "file:/dev/full"], name=["", "second"], file_limit=2)
    async with running(console, features=MULTIPORT | VERSION_1) as driver:
        await driver.request([b"abc"], queue=1)
        await tell(driver, control(0, PORT_READY), control(1, PORT_READY))
        await driver.request([b"abc"], queue=5)
    name = console.log.device
    said = [(vars(record)["device"], record.getMessage()) for record in caplog.records]
    assert said == [
        (name, f"{name}: {what}; what the guest writes from now on is lost")
        for what in (f"file:{tmp_path}/small has its full size", "file:/dev/full: No space left on device")
    ]
