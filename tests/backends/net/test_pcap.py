"""Replay of capture files to a guest."""

from pathlib import Path

import pytest
import trio
import trio.testing
from support.net_device import Device, running

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import MAX_FRAME
from vfiouser_virtio.backends.net.pcap import PcapNetdev
from vfiouser_virtio.backends.net.pcap_file import packet, section
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.protocols.pcap import PacketDirection

START = 1_700_000_000_000_000_000


def capture(tmp_path: Path, *packets: bytes) -> Path:
    path = tmp_path / "capture.pcapng"
    path.write_bytes(section("test", "net0", 262144) + b"".join(packets))
    return path


def frame(number: int) -> bytes:
    return number.to_bytes(4, "big").ljust(60, b".")


def recorded(number: int, after: float = 0.0, direction: PacketDirection = PacketDirection.INBOUND) -> bytes:
    return packet(frame(number), 60, START + round(after * 1e9), direction)


async def replayed(device: Device, count: int) -> None:
    """Wait for so many frames. Without a deadline: trio's clock of tests would jump there while a thread reads."""
    enough = trio.Event()
    device.answer = lambda _: enough.set() if len(device.frames) == count else None
    if len(device.frames) < count:
        await enough.wait()


async def test_packets_come_at_the_pace_they_were_recorded_at(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = capture(tmp_path, recorded(0), recorded(1, 0.5), recorded(2, 0.4), recorded(3, 3600))
    netdev, device = PcapNetdev(pcap=path), Device()
    async with running(netdev, device):
        await replayed(device, 4)
    gaps = [time - device.times[0] for time in device.times]
    assert gaps == [0, pytest.approx(0.5), pytest.approx(0.5), pytest.approx(3600)]
    assert device.taken() == [frame(number) for number in range(4)]
    assert netdev.counters.rx_packets == 4
    assert netdev.describe() == f"pcap {path}"
    netdev.close()


async def test_at_once_they_come_as_fast_as_the_guest_takes_them_and_each_time_again(tmp_path: Path) -> None:
    path = capture(tmp_path, *(recorded(number, number * 1000) for number in range(200)))
    netdev = PcapNetdev(pcap=path, at_once=True)
    for _ in range(2):
        device = Device(room=3)
        async with running(netdev, device):
            await replayed(device, 3)
            await trio.testing.wait_all_tasks_blocked()
            assert len(device.frames) == 3
            device.make_room(1000)
            await replayed(device, 200)
        assert device.taken() == [frame(number) for number in range(200)]
    netdev.close()


async def test_what_the_recorded_interface_sent_itself_is_left_out_unless_it_is_wanted(tmp_path: Path) -> None:
    directions = [PacketDirection.INBOUND, PacketDirection.OUTBOUND, PacketDirection.UNKNOWN]
    path = capture(tmp_path, *(recorded(number, direction=each) for number, each in enumerate(directions)))
    for outbound, expected in ((False, [frame(0), frame(2)]), (True, [frame(0), frame(1), frame(2)])):
        netdev, device = PcapNetdev(pcap=path, outbound=outbound), Device()
        async with running(netdev, device):
            await replayed(device, len(expected))
        assert device.taken() == expected
        netdev.close()


async def test_what_the_guest_sends_is_dropped_and_counted(tmp_path: Path) -> None:
    netdev = PcapNetdev(pcap=capture(tmp_path))
    assert netdev.put(frame_of(frame(1)))
    assert netdev.counters.tx_drops.by_reason == {Drop.NO_NETWORK: 1}
    await netdev.wait_room()
    netdev.close()


async def test_damage_further_on_ends_the_replay_after_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = capture(tmp_path, recorded(0), recorded(1), recorded(2)[:-1])
    netdev, device = PcapNetdev(pcap=path, at_once=True), Device()
    async with running(netdev, device):
        while not caplog.messages:
            await trio.sleep(0.001)
    assert device.taken() == [frame(0), frame(1)]
    (message,) = caplog.messages
    assert "in the middle of a block: the replay ends" in message
    netdev.close()


async def test_a_file_that_is_gone_later_ends_the_replay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = capture(tmp_path, recorded(0))
    netdev = PcapNetdev(pcap=path)
    path.unlink()
    async with running(netdev, Device()):
        while not caplog.messages:
            await trio.sleep(0.001)
    assert "No such file or directory: the replay ends" in caplog.messages[0]
    netdev.close()


async def test_a_packet_that_is_no_frame_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = capture(tmp_path, packet(bytes(MAX_FRAME + 1), MAX_FRAME + 1, START, PacketDirection.INBOUND), recorded(1))
    netdev, device = PcapNetdev(pcap=path), Device()
    async with running(netdev, device):
        await replayed(device, 1)
    assert device.taken() == [frame(1)]
    assert netdev.counters.rx_drops.by_reason == {Drop.TOO_LONG: 1}
    assert "a packet of 0x10037 bytes is left out" in caplog.text
    netdev.close()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file or directory"),
        (b"", "no capture file"),
        (b"GIF89a", "neither pcapng nor pcap"),
    ],
)
def test_what_cannot_be_replayed_is_said_at_once(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DeviceError, match=what):
        PcapNetdev(pcap=path)
