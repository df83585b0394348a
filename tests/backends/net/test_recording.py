"""Recording of frames while they pass."""

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from support.net_device import Device, running

from vfiouser_virtio.backends.net import recording
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.pcap_file import Packet, packets
from vfiouser_virtio.backends.net.port import NetPort
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols.pcap import PacketDirection
from vfiouser_virtio.vm import debian, programs

TO_ALL = b"\xff" * 6 + b"\x52\0\0\0\0\1" + b"\x88\xb5"


def read(path: Path) -> list[Packet]:
    return list(packets([path.read_bytes()]))


def ticks() -> Callable[[], int]:
    """Nanoseconds: one thousand more each time."""
    now = 1_700_000_000_123_456_000

    def clock() -> int:
        nonlocal now
        now += 1000
        return now

    return clock


async def test_frames_of_both_directions_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    path.write_bytes(b"an older recording" * 1000)
    port = NetPort()
    recorded, device = RecordedNetdev(port, dump=path, clock=ticks()), Device()
    async with running(recorded, device):
        memory = bytearray(TO_ALL + b"question")
        assert recorded.put(Frame([memoryview(memory)[:10], memoryview(memory)[10:]], len(memory)))
        memory[:] = bytes(len(memory))
        await port.send(TO_ALL + b"answer")
    recorded.close()

    assert read(path) == [
        Packet(1_700_000_000_123_457_000, TO_ALL + b"question", PacketDirection.OUTBOUND),
        Packet(1_700_000_000_123_458_000, TO_ALL + b"answer", PacketDirection.INBOUND),
    ]
    assert device.taken() == [TO_ALL + b"answer"]


def test_a_new_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    RecordedNetdev(NullNetdev(), dump=path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert read(path) == []


async def test_a_frame_that_waits_for_room_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    port = NetPort()
    recorded, device = RecordedNetdev(port, dump=path), Device(room=0)
    async with running(recorded, device) as nursery:
        nursery.start_soon(port.send, TO_ALL)
        await trio.testing.wait_all_tasks_blocked()
        device.make_room(1)
        await trio.testing.wait_all_tasks_blocked()
    recorded.close()
    assert [each.data for each in read(path)] == [TO_ALL]


async def test_the_rest_is_the_other_netdevs(tmp_path: Path) -> None:
    hub, far = HubNetdev(hub="lan"), HubNetdev(hub="lan")
    recorded, device = RecordedNetdev(hub, dump=tmp_path / "x"), Device()
    async with running(recorded, Device()), running(far, device):
        recorded.put(frame_of(TO_ALL))
        await recorded.wait_room()
        assert device.taken() == [TO_ALL]
    assert recorded.describe() == "hub lan"
    assert recorded.counters is hub.counters
    assert recorded.link
    assert recorded.does == hub.does
    recorded.close()


def test_long_frames_may_be_recorded_in_part(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    recorded = RecordedNetdev(NullNetdev(), dump=path, dump_maxlen=20)
    recorded.put(frame_of(TO_ALL + bytes(100)))
    recorded.close()
    assert [each.data for each in read(path)] == [TO_ALL + bytes(6)]


def test_a_file_grows_to_its_limit_and_no_further(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.pcapng"
    recorded = RecordedNetdev(NullNetdev(), dump=path, dump_limit=1)
    for _ in range(40):
        assert recorded.put(frame_of(TO_ALL + bytes(60_000)))
    recorded.close()
    assert len(read(path)) == 17
    assert path.stat().st_size <= 1 << 20
    assert [message for message in caplog.messages if "has its full size" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_reader_that_is_slow_loses_frames_and_is_told_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that is full holds nothing up, as a disk that hangs."""
    monkeypatch.setattr(recording, "QUEUE_BYTES", 300_000)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorded = RecordedNetdev(NullNetdev(), dump=path)
    for _ in range(100):
        assert recorded.put(frame_of(TO_ALL + bytes(10_000)))

    got: list[bytes] = []
    os.set_blocking(reader, True)

    def drain() -> None:
        while piece := os.read(reader, 1 << 16):
            got.append(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    while not recorded.writer.put(b""):  # until there is room again
        pass
    while recorded.writer.waiting:
        pass
    recorded.put(frame_of(TO_ALL + b"late"))
    recorded.close()
    thread.join()
    os.close(reader)
    data = b"".join(got)
    found = list(packets([data]))
    assert found[-1].data == TO_ALL + b"late"
    lost = 100 - (len(found) - 1)
    assert lost >= 70
    assert b"\x04\0\x08\0" + lost.to_bytes(8, "little") in data[-100:]  # epb_dropcount


def test_a_reader_that_leaves_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorded = RecordedNetdev(NullNetdev(), dump=path)
    os.close(reader)
    while recorded.writer.thread.is_alive():
        assert recorded.put(frame_of(TO_ALL))
    assert recorded.put(frame_of(TO_ALL))
    recorded.close()
    assert "Broken pipe; what passes from now on is not in it" in caplog.text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dump_maxlen": 13}, "dump-maxlen=13: expected 14 to 262144"),
        ({"dump_limit": 0}, "dump-limit=0: expected 1 or more MiB"),
    ],
)
def test_numbers_out_of_range_are_said(tmp_path: Path, options: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        RecordedNetdev(NullNetdev(), dump=tmp_path / "x", **options)  # type: ignore[arg-type] # one of several


def test_a_name_that_is_no_text_is_recorded_all_the_same(tmp_path: Path) -> None:
    """Such as that of a path that is not in UTF-8: it is in the description of the interface."""
    RecordedNetdev(HubNetdev(hub="\udcff"), dump=tmp_path / "x").close()
    assert b"hub ?" in (tmp_path / "x").read_bytes()


def test_files_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "x")
    os.mkfifo(tmp_path / "fifo")
    for name, what in (
        ("none/x", "No such file"),
        ("link", "is a symbolic link: name the file itself"),
        (".", "directory"),
        ("fifo", "a FIFO that nobody reads"),
    ):
        with pytest.raises(DeviceError, match=what):
            RecordedNetdev(NullNetdev(), dump=tmp_path / name)
    assert not (tmp_path / "x").exists()


@pytest.mark.qemu  # as what fetches programs
@pytest.mark.once
def test_tcpdump_opens_it(tmp_path: Path) -> None:
    """A reader that is not ours, with libpcap, has the times, lengths and bytes of what passed."""
    path = tmp_path / "x.pcapng"
    recorded = RecordedNetdev(NullNetdev(), dump=path, dump_maxlen=40, clock=ticks())
    recorded.put(frame_of(TO_ALL + b"question"))
    recorded.record(frame_of(TO_ALL + bytes(100)), PacketDirection.INBOUND)
    recorded.close()
    program = programs.argv(debian.fetch("tcpdump", ["tcpdump"], megabytes=3), "tcpdump")
    as_root = [] if os.geteuid() else ["-Z", "root"]  # else it wants a user of its own
    shown = subprocess.run(
        [*program, "-n", "-e", "-tt", "-x", *as_root, "-r", str(path)], capture_output=True, text=True, check=True
    ).stdout
    whole, cut = shown.split("1700000000.123458 ")
    assert whole.startswith(
        "1700000000.123457 52:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype Unknown (0x88b5), length 22"
    )
    assert cut.startswith("52:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype Unknown (0x88b5), length 114")
    assert "7175 6573 7469 6f6e" in whole  # "question", in hex
    assert cut.split().count("0000") == 13  # of 114 bytes 40 are there, 26 of them behind the Ethernet header
