"""``conform --exercise``: a request of the user's for a device type that the checks do not know."""

from functools import partial
from pathlib import Path

import pytest
import trio
from support.command import run_command, serve_process

pytestmark = pytest.mark.once

FILE = """
from construct import Int32ul, Struct
from vfiouser_virtio.guest import DEVICE_TYPES, DeviceType
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.testing.conformance import Exercise
from vfiouser_virtio.virtio import Device, queue

CONFIG = Struct("limit" / Int32ul)
DEVICE_TYPES[63] = DeviceType("reverse", CONFIG, queues=("requestq",))

class Reverse(Device):
    device_id = 63
    requestq = queue(max_size=16)

    def __init__(self):
        super().__init__(config=record(CONFIG)(limit=4096))

    async def run(self):
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read()[::-1])
            chain.complete()

def complaint(data, used):
    return "" if data[:used] == b"cba" else f"answered {data[:used]}"

EXERCISE = Exercise("reverse", 0, b"abc", 8, complaint)
WRONG = Exercise("reverse", 0, b"abd", 8, complaint)

def exercise():
    return EXERCISE

def broken():
    raise KeyError("x")
"""


@pytest.mark.parametrize(
    ("name", "status", "verdict"),
    [("EXERCISE", 0, "pass  virtio14/UR1"), ("exercise", 0, "pass  virtio14/UR1"), ("WRONG", 1, "answered b'dba'")],
)
async def test_rings_of_a_type_of_ones_own(tmp_path: Path, name: str, status: int, verdict: str) -> None:
    (tmp_path / "reverse.py").write_text(FILE)
    served = f"{tmp_path}/reverse.py:Reverse,socket={tmp_path}/r.sock"
    async with serve_process("--device", served, folder=tmp_path):
        wanted = ["conform", "--timeout", "60", "--only", "virtio14/UR*", f"{tmp_path}/r.sock"]
        without = await trio.to_thread.run_sync(run_command, *wanted)
        assert without.returncode == 0
        assert "needs a device type that can be exercised" in without.stdout
        ask = partial(run_command, "conform", "--exercise", f"reverse.py:{name}", *wanted[1:], cwd=tmp_path)
        done = await trio.to_thread.run_sync(ask)
        assert done.returncode == status, done.stdout + done.stderr
        assert verdict in done.stdout
        assert "needs a device type that can be exercised" not in done.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("reverse.py", "expected FILE.py:NAME"),
        ("none.py:E", "exercise file none.py: No such file"),
        ("reverse.py:Nothing", "Nothing is no vfiouser_virtio.testing.conformance.Exercise"),
        ("reverse.py:broken", "broken() raised KeyError: 'x'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, given: str, words: str) -> None:
    (tmp_path / "reverse.py").write_text(FILE)
    done = run_command("conform", "--exercise", given, "none.sock", cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert words in line
