"""The boot server's TFTP: transfers, their options, what is lost on the way, and clients that lie.

A long file, since one client, made for it here, asks for all of it.
"""

import os
import struct
import threading
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.boot_client import CLIENT, TFTP, ack, download, read_udp, rrq, udp
from support.net_sink import Sink

from vfiouser_virtio.backends.net.boot import tftp
from vfiouser_virtio.backends.net.boot.folder import Folder, ServedFile
from vfiouser_virtio.backends.net.boot.host import Station
from vfiouser_virtio.backends.net.boot.netdev import QUEUE, BootNetdev
from vfiouser_virtio.backends.net.boot.tftp import MAX_ENDING, MAX_TRANSFERS, READ_AHEAD, SILENCE, TRIES, Transfer
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.protocols.tftp import TftpRequest

ARP = bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a00020f 000000000000 0a000202")
DATA = bytes((at * 7 + (at >> 8)) & 0xFF for at in range(READ_AHEAD + 70_000))


class Client:
    """Sends, and receives in order."""

    def __init__(self, netdev: BootNetdev, sink: Sink) -> None:
        self.netdev = netdev
        self.sink = sink
        self._read = 0

    def send(self, frame: bytes) -> None:
        assert self.netdev.put(frame_of(frame))

    async def receive(self) -> bytes:
        self._read += 1
        return await self.sink.wait_frame(self._read - 1)

    async def payload(self) -> tuple[int, bytes]:
        """Of the next datagram, and the port that it came from."""
        got = read_udp(await self.receive())
        return got.source_port, got.payload

    async def download(self, name: str, port: int = 1024, **options: object) -> tuple[bytes, dict[str, int]]:
        with trio.fail_after(60):
            return await download(self.send, self.receive, name, options, port=port)

    async def nothing(self) -> None:
        """Nothing has come that was not received, and nothing is on its way."""
        await trio.testing.wait_all_tasks_blocked()
        assert len(self.sink.frames) == self._read


@pytest.fixture
async def client(tmp_path: Path, nursery: trio.Nursery) -> Client:
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(DATA[:3])
    client = Client(BootNetdev(tftp=tmp_path), Sink())
    nursery.start_soon(client.netdev.run, client.sink)
    await trio.testing.wait_all_tasks_blocked()
    return client


async def ended(client: Client) -> None:
    """Wait until no transfer is in progress; the last packet has been put before."""
    with trio.fail_after(60):
        while client.netdev.transfers:
            await trio.sleep(0.01)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 5000])
async def test_a_file_of_any_size_by_the_first_protocol(client: Client, tmp_path: Path, size: int) -> None:
    (tmp_path / "some").write_bytes(DATA[:size])
    assert await client.download("some") == (DATA[:size], {})
    await ended(client)
    await client.nothing()


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"blksize": 1432, "tsize": 0}, {"blksize": 1432, "tsize": len(DATA)}),
        ({"blksize": 65464, "windowsize": 4}, {"blksize": 1468, "windowsize": 4}),
        ({"tsize": 0, "windowsize": 65535, "blksize": 1024}, {"tsize": len(DATA), "windowsize": 16, "blksize": 1024}),
        ({"timeout": 7, "BlkSize": 1468, "multicast": "", "x": 1}, {"timeout": 7, "blksize": 1468}),
        ({"blksize": 7, "timeout": 0, "windowsize": 0, "tsize": -1, "utimeout": "9" * 99}, {}),
        ({"blksize": "0x10", "timeout": 256, "windowsize": "9" * 99, "tsize": "１"}, {}),
    ],
)  # fmt: skip
async def test_options_are_taken_or_left(client: Client, asked: dict[str, Any], given: dict[str, int]) -> None:
    data, taken = await client.download("/file", **asked)
    assert data == DATA
    assert taken == given


async def test_several_clients_at_a_time(client: Client, nursery: trio.Nursery) -> None:
    results: dict[int, bytes] = {}
    inbox: dict[int, trio.MemorySendChannel[bytes]] = {}

    async def one(port: int, frames: trio.MemoryReceiveChannel[bytes]) -> None:
        results[port], _ = await download(client.send, frames.receive, "file", {"windowsize": port - 1000}, port=port)

    async def distribute() -> None:
        while True:
            frame = await client.receive()
            inbox[read_udp(frame).port].send_nowait(frame)
            await trio.lowlevel.checkpoint()

    nursery.start_soon(distribute)
    with trio.fail_after(60):
        async with trio.open_nursery() as clients:
            for port in range(1001, 1007):
                inbox[port], frames = trio.open_memory_channel[bytes](100)
                clients.start_soon(one, port, frames)
    assert len(results) == 6
    assert set(results.values()) == {DATA}


async def refusal(client: Client, payload: bytes) -> tuple[int, str]:
    client.send(udp(payload, TFTP))
    _, got = await client.payload()
    assert got[:2] == b"\0\5"
    await ended(client)
    return got[3], got[4:-1].decode()


async def test_what_is_not_given_out(client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path.parent / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    assert await refusal(client, rrq("missing")) == (1, "No such file or directory")
    assert await refusal(client, rrq("../secret")) == (2, "it leads out of the folder, or is no regular file")
    assert await refusal(client, rrq("folder")) == (2, "it is no regular file")
    assert await refusal(client, rrq("\x1b[2J\n")) == (1, "No such file or directory")
    assert await refusal(client, rrq("file", mode="NetASCII")) == (4, "mode is not octet (in tftp(1): binary)")
    assert await refusal(client, rrq("new", opcode=2)) == (2, "files are given out, none are taken")
    assert not (tmp_path / "new").exists()
    await refusal(client, rrq("missing"))
    assert caplog.messages[0] == f"netdev: TFTP: 'missing' of {tmp_path}: No such file or directory"
    assert len(caplog.messages) == 4
    assert "\x1b" not in caplog.text


async def test_a_file_is_named_in_the_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for _ in range(2):
        await client.download("short", blksize=100)
    assert caplog.messages == ["netdev: TFTP: 'short', 3 bytes"]
    assert not (await client.download("empty"))[0]


async def test_a_client_that_only_wants_to_know_the_size(client: Client) -> None:
    """As firmware does: it takes the answer and ends with an error."""
    client.send(udp(rrq("file", {"tsize": 0}), TFTP))
    port, got = await client.payload()
    assert got == b"\0\6tsize\0%d\0" % len(DATA)
    client.send(udp(struct.pack("!HH", 5, 8) + b"\0", port))
    await ended(client)
    await client.nothing()


async def later(clock: trio.testing.MockClock, seconds: float) -> None:
    """Let time go by once all wait for it: a timer that is set after that would wait for ever."""
    await trio.testing.wait_all_tasks_blocked()
    clock.jump(seconds)


# ---- losses ----------------------------------------------------------------------------------------------------------


async def test_what_is_not_acknowledged_is_sent_again(client: Client, mock_clock: trio.testing.MockClock) -> None:
    client.send(udp(rrq("file", {"blksize": 1000}), TFTP))
    port, oack = await client.payload()
    await later(mock_clock, 1.01)
    assert await client.payload() == (port, oack)
    client.send(udp(ack(0), port))
    _, first = await client.payload()
    await later(mock_clock, 1.01)
    assert await client.payload() == (port, first)
    assert first == b"\0\3\0\1" + DATA[:1000]
    client.send(udp(ack(1), port))
    assert (await client.payload())[1] == b"\0\3\0\2" + DATA[1000:2000]
    # Repeated and future acknowledgements change nothing: nothing is sent twice for them.
    for number in (1, 0, 3, 65535):
        client.send(udp(ack(number), port))
    await client.nothing()


async def test_a_client_that_is_gone_is_given_up(client: Client, mock_clock: trio.testing.MockClock) -> None:
    client.send(udp(rrq("file", {"timeout": 100}), TFTP))
    for _ in range(TRIES):
        await client.payload()
        assert client.netdev.transfers == 1
        await later(mock_clock, 99)
        await client.nothing()
        await later(mock_clock, 1.01)
    await trio.testing.wait_all_tasks_blocked()
    assert client.netdev.transfers == 0


async def test_a_window_goes_on_behind_what_has_arrived(client: Client, mock_clock: trio.testing.MockClock) -> None:
    client.send(udp(rrq("file", {"windowsize": 4}), TFTP))
    port, _ = await client.payload()
    client.send(udp(ack(0), port))

    async def window() -> list[int]:
        return [int.from_bytes((await client.payload())[1][2:4], "big") for _ in range(4)]

    assert await window() == [1, 2, 3, 4]
    client.send(udp(ack(2), port))  # the third was lost
    assert await window() == [3, 4, 5, 6]
    await later(mock_clock, 1.01)  # all of them were lost
    assert await window() == [3, 4, 5, 6]
    client.send(udp(ack(6), port))
    assert await window() == [7, 8, 9, 10]
    await client.nothing()


async def test_block_numbers_go_round(tmp_path: Path) -> None:
    """65536 blocks and more, as of a file of 100 MB: a transfer without the network around it."""
    size = 8 * 65540 + 3
    (tmp_path / "file").write_bytes(data := DATA * (size // len(DATA)) + DATA[: size % len(DATA)])
    got: list[bytes] = []

    async def send(payload: bytes) -> None:
        if payload[1] == 3:
            got.append(payload)
            transfer.receive(memoryview(b"\0\4" + payload[2:4]))
        else:
            transfer.receive(memoryview(ack(0)))

    async def in_thread(call: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call()

    client = (Station(bytes(6), IPv4Address(CLIENT)), 1024)
    transfer = Transfer(client, TftpRequest(b"file", "octet", {"blksize": "8", "windowsize": "16"}), send, in_thread)
    with trio.fail_after(120):
        await transfer.run(Folder(tmp_path).open(b"file"))
    assert b"".join(each[4:] for each in got) == data
    assert [int.from_bytes(each[2:4], "big") for each in got[65533:65537]] == [65534, 65535, 0, 1]


# ---- clients that lie, hosts that are slow ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\0\1",
        b"\0\3\0\1data",
        b"\0\4\0\1",
        b"\0\7file\0octet\0",
        b"\0\1file\0octet",
        b"\0\1file\0",
        b"\0\1\0octet\0",
        b"\0\1file\0octet\0blksize\0",
        b"\0\1file\0octet\0" + b"a\0" * 300,
        rrq("x" * 600),
    ],
)
async def test_what_is_no_request_is_dropped_and_said_once(
    client: Client, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        client.send(udp(payload, TFTP))
    await client.nothing()
    assert client.netdev.counters.tx_dropped == 3
    assert client.netdev.transfers == 0
    (record,) = caplog.records
    assert "dropped: TFTP: " in record.getMessage()


async def test_a_transfer_belongs_to_its_client(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    client.send(udp(rrq("file"), TFTP))
    port, _ = await client.payload()
    for frame in (
        udp(ack(1), port, source_port=1025),
        udp(ack(1), port, source="10.0.2.16"),
        udp(ack(1), port, mac=b"\x52\0\0\0\0\1"),
        udp(ack(1), port + 1),
        udp(b"\0\5\0\0\0", port, source_port=1025),
    ):
        client.send(frame)
    await client.nothing()
    assert client.netdev.counters.tx_dropped == 5
    assert not caplog.records
    for payload in (b"\0\4\0", b"\0\3\0\1data"):
        client.send(udp(payload, port))
    await client.nothing()
    assert client.netdev.counters.tx_dropped == 7
    assert client.netdev.transfers == 1
    client.send(udp(ack(1), port))
    assert (await client.payload())[1][:4] == b"\0\3\0\2"


async def test_a_request_again_is_the_same_one_or_takes_its_place(client: Client) -> None:
    for _ in range(3):
        client.send(udp(rrq("file"), TFTP))
    port, _ = await client.payload()
    await client.nothing()
    assert client.netdev.transfers == 1
    client.send(udp(rrq("short"), TFTP))
    other, got = await client.payload()
    assert got == b"\0\3\0\1" + DATA[:3]
    assert other != port
    await trio.testing.wait_all_tasks_blocked()
    assert client.netdev.transfers == 1
    client.send(udp(ack(1), other))
    await ended(client)


async def test_there_are_so_many_transfers_and_no_more(client: Client) -> None:
    for port in range(2000, 2000 + MAX_TRANSFERS + 3):
        client.send(udp(rrq("file", {"windowsize": 16}), TFTP, source_port=port))
    ports, refused = {}, {}
    for _ in range(MAX_TRANSFERS + 3):
        got = read_udp(await client.receive())
        if got.payload[1] == 5:
            refused[got.port] = got.payload
        else:
            ports[got.port] = got.source_port
    await client.nothing()
    assert set(ports) == set(range(2000, 2000 + MAX_TRANSFERS))
    text = b"\0\5\0\0%d files are on their way already\0" % MAX_TRANSFERS
    assert refused == dict.fromkeys(range(2000 + MAX_TRANSFERS, 2000 + MAX_TRANSFERS + 3), text)
    assert client.netdev.counters.tx_dropped == 3
    # All their windows together are more than wait for the guest at a time: they wait for each other.
    for port, theirs in ports.items():
        client.send(udp(ack(0), theirs, source_port=port))
    for _ in range(16 * MAX_TRANSFERS):
        await client.receive()
    assert client.netdev.counters.rx_dropped == 0


async def test_silent_clients_make_room(client: Client, mock_clock: trio.testing.MockClock) -> None:
    for port in range(2000, 2000 + MAX_TRANSFERS):
        client.send(udp(rrq("file", {"timeout": 255}), TFTP, source_port=port))
    await trio.testing.wait_all_tasks_blocked()
    ports = {}
    for _ in range(MAX_TRANSFERS):
        got = read_udp(await client.receive())
        ports[got.port] = got.source_port
    await later(mock_clock, SILENCE - 1)
    for port in (2000, 2001):
        client.send(udp(ack(0), ports[port], source_port=port))
        await client.receive()
    client.send(udp(rrq("short"), TFTP, source_port=3000))
    assert (await client.payload())[1][:2] == b"\0\5"
    await later(mock_clock, 1.1)
    for port in range(3000, 3000 + MAX_TRANSFERS - 2):
        client.send(udp(rrq("short"), TFTP, source_port=port))
        assert (await client.payload())[1] == b"\0\3\0\1" + DATA[:3]
    client.send(udp(rrq("short"), TFTP, source_port=4000))
    assert (await client.payload())[1][:2] == b"\0\5"
    assert client.netdev.transfers == MAX_TRANSFERS
    for port in (2000, 2001):  # these were not silent
        client.send(udp(ack(1), ports[port], source_port=port))
        assert (await client.payload())[1][:4] == b"\0\3\0\2"


@pytest.mark.parametrize("request_of", [lambda name: rrq(name, opcode=2), lambda name: rrq(name, mode="netascii"), rrq])
@pytest.mark.parametrize("at_once", [1, 1000])
async def test_requests_that_take_the_place_of_others_are_bounded(
    tmp_path: Path, nursery: trio.Nursery, request_of: Callable[[str], bytes], at_once: int
) -> None:
    """Of one port, while the guest takes nothing: what was there before has to end."""
    netdev, sink = BootNetdev(tftp=tmp_path), Sink(room=0)
    nursery.start_soon(netdev.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(QUEUE + 1):
        netdev.put(frame_of(ARP))  # and so there is no room for an answer
    await trio.testing.wait_all_tasks_blocked()
    most = 0
    for number in range(1000):
        assert netdev.put(frame_of(udp(request_of(f"name{number}"), TFTP)))
        most = max(most, netdev.ending)
        if number % at_once == 0:
            await trio.testing.wait_all_tasks_blocked()
            assert netdev.ending <= 1
    assert most <= (2 if at_once == 1 else MAX_ENDING)
    await trio.testing.wait_all_tasks_blocked()
    assert (netdev.transfers, netdev.ending) == (1, 1)


async def test_a_client_that_ends_its_transfer_and_asks_again_at_once(client: Client) -> None:
    client.send(udp(rrq("short"), TFTP))
    port, first = await client.payload()
    client.send(udp(b"\0\5\0\0\0", port))
    client.send(udp(rrq("short"), TFTP))
    other, again = await client.payload()
    assert again == first
    assert other != port


async def test_a_request_while_the_server_ends(tmp_path: Path) -> None:
    """Whenever it comes, in whatever is left of `run`: it is for nobody, or begins a transfer that ends too."""
    (tmp_path / "file").write_bytes(DATA)
    netdev = BootNetdev(tftp=tmp_path)
    for ticks in range(8):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def run(scope: trio.CancelScope = scope) -> None:
                with scope:
                    await netdev.run(Sink(room=0))

            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            for _ in range(ticks):
                await trio.lowlevel.cancel_shielded_checkpoint()
            netdev.put(frame_of(udp(rrq("file"), TFTP)))
        assert (netdev.transfers, netdev.ending) == (0, 0)


async def test_a_guest_without_room(tmp_path: Path, nursery: trio.Nursery) -> None:
    (tmp_path / "file").write_bytes(DATA)
    netdev, sink = BootNetdev(tftp=tmp_path), Sink(room=0)
    nursery.start_soon(netdev.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(QUEUE + 10):
        assert netdev.put(frame_of(ARP))
    # The first one is on its way to the device.
    assert netdev.counters.rx_dropped == 9
    assert netdev.put(frame_of(udp(rrq("file"), TFTP)))
    await trio.testing.wait_all_tasks_blocked()
    sink.more(1000)
    frames = await sink.wait_frames(QUEUE + 2)
    assert read_udp(frames[-1]).payload[:4] == b"\0\3\0\1"
    assert netdev.counters.rx_packets == QUEUE + 2


async def test_a_file_that_becomes_shorter(client: Client, tmp_path: Path) -> None:
    client.send(udp(rrq("file", {"blksize": 1400}), TFTP))
    port, _ = await client.payload()
    os.truncate(tmp_path / "file", 1000)
    client.send(udp(ack(0), port))
    assert (await client.payload())[1] == b"\0\5\0\0the file has become shorter\0"
    await ended(client)


async def test_a_reset_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    client = Client(BootNetdev(tftp=tmp_path), Sink())
    before = len(os.listdir("/proc/self/fd"))
    tasks = trio.lowlevel.current_statistics().tasks_living
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.netdev.run, client.sink)
            await trio.testing.wait_all_tasks_blocked()
            client.send(udp(rrq("file"), TFTP))
            await client.payload()
            assert len(os.listdir("/proc/self/fd")) == before + 1
            nursery.cancel_scope.cancel()
        assert client.netdev.transfers == 0
        assert len(os.listdir("/proc/self/fd")) == before
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_a_file_system_that_hangs_delays_its_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(DATA)
    hanging = threading.Event()
    reading: list[ServedFile] = []

    def read(self: ServedFile, offset: int, count: int) -> bytes:
        reading.append(self)
        hanging.wait(60)
        return b""

    monkeypatch.setattr(ServedFile, "read", read)
    client = Client(BootNetdev(tftp=tmp_path), Sink())
    try:
        for round_ in range(1, 5):  # more readers than there are would be left behind
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.netdev.run, client.sink)
                await trio.testing.wait_all_tasks_blocked()
                for port in range(3):
                    client.send(udp(rrq("file"), TFTP, source_port=2000 + port))
                client.send(ARP)
                assert (await client.receive())[12:14] == b"\x08\x06"
                with trio.fail_after(30):
                    while len(reading) < min(tftp.READERS, 3 * round_):
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert 0 < len(reading) <= tftp.READERS  # none of them has come back
    finally:
        hanging.set()
