"""The boot server's DHCP, as clients see it: Linux's, firmware's and iPXE's."""

import os
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from support.boot_client import (
    ACK,
    BROADCAST,
    CLIENT,
    DECLINE,
    DISCOVER,
    EVERYBODY,
    INFORM,
    MAC,
    NAK,
    NOBODY,
    OFFER,
    RELEASE,
    REQUEST,
    SERVER,
    DhcpReply,
    dhcp,
    dhcp_message,
    packed,
    read_dhcp,
    udp,
)
from support.net_sink import Sink

from vfiouser_virtio.backends.net.boot.netdev import BootNetdev
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import frame_of

OTHER = bytes.fromhex("525400000002")
UUID = bytes(range(17))


class Client:
    """What it sends is answered before `ask` returns."""

    def __init__(self, netdev: BootNetdev) -> None:
        self.netdev = netdev
        self.sink = Sink()

    async def ask(self, frame: bytes) -> list[bytes]:
        before = len(self.sink.frames)
        assert self.netdev.put(frame_of(frame))
        await trio.testing.wait_all_tasks_blocked()
        return [each.tobytes() for each in self.sink.frames[before:]]

    async def one(self, frame: bytes, *, mac: bytes = MAC) -> DhcpReply:
        (reply,) = await self.ask(frame)
        return read_dhcp(reply, mac=mac)


@pytest.fixture
async def client(tmp_path: Path, nursery: trio.Nursery) -> Client:
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    client = Client(BootNetdev(tftp=tmp_path, bootfile="vmlinuz", hostname="guest"))
    nursery.start_soon(client.netdev.run, client.sink)
    await trio.testing.wait_all_tasks_blocked()
    return client


async def test_an_address_is_offered_and_taken(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    offer = await client.one(dhcp(DISCOVER))
    assert (offer.type, offer.yiaddr, offer.siaddr, offer.file) == (OFFER, CLIENT, SERVER, "vmlinuz")
    assert offer.sent_to == (MAC, CLIENT)
    expected = {
        1: packed("255.255.255.0"),
        3: packed(SERVER),
        12: b"guest",
        51: struct.pack("!I", 86400),
        53: b"\2",
        54: packed(SERVER),
        66: SERVER.encode(),
        67: b"vmlinuz",
    }
    assert offer.options == expected
    assert "DHCP" not in caplog.text
    request = dhcp(REQUEST, {50: packed(CLIENT), 54: packed(SERVER)}, flags=0x8000)
    taken = await client.one(request)
    assert (taken.type, taken.yiaddr, taken.options) == (ACK, CLIENT, expected | {53: b"\5"})
    assert taken.sent_to == (BROADCAST, EVERYBODY)
    assert caplog.messages == ["netdev: DHCP: 52:54:00:12:34:56 has 10.0.2.15"]
    assert (await client.one(dhcp(DISCOVER, mac=OTHER), mac=OTHER)).yiaddr == "10.0.2.16"
    assert client.netdev.counters.tx_dropped == 0


async def test_firmware_and_ipxe_are_told_what_they_would_wait_for(client: Client) -> None:
    firmware = {60: b"PXEClient:Arch:00007:UNDI:003000", 93: b"\0\7", 97: UUID, 55: bytes((1, 3, 43, 60, 66, 67))}
    for kind in (DISCOVER, REQUEST):
        reply = await client.one(dhcp(kind, firmware | {50: packed(CLIENT)}))
        assert reply.options[60] == b"PXEClient"
        assert reply.options[43] == bytes((6, 1, 8, 255))
        assert reply.options[97] == UUID
        assert 175 not in reply.options
    ipxe = await client.one(dhcp(DISCOVER, firmware | {97: UUID[:9], 175: b"\x13\1\1", 77: b"iPXE"}))
    assert ipxe.options[175] == bytes((176, 1, 1, 255))
    assert 97 not in ipxe.options
    assert len(ipxe.file) + sum(len(value) + 2 for value in ipxe.options.values()) < 548 - 240


async def test_without_a_boot_file_there_is_only_an_address(nursery: trio.Nursery) -> None:
    client = Client(BootNetdev(net="192.0.2.64/255.255.255.192", host="192.0.2.65", dhcpstart="192.0.2.65"))
    nursery.start_soon(client.netdev.run, client.sink)
    await trio.testing.wait_all_tasks_blocked()
    assert client.netdev.describe() == "boot 192.0.2.64/26, server 192.0.2.65"
    (frame,) = await client.ask(dhcp(DISCOVER, {60: b"PXEClient"}))
    offer = read_dhcp(frame, server="192.0.2.65")
    assert (offer.yiaddr, offer.siaddr, offer.file) == ("192.0.2.66", NOBODY, "")
    assert set(offer.options) == {1, 3, 51, 53, 54}
    assert offer.options[1] == packed("255.255.255.192")


async def test_the_address_stays_over_renewal_and_reboot(client: Client) -> None:
    await client.one(dhcp(DISCOVER))
    await client.one(dhcp(REQUEST, {50: packed(CLIENT), 54: packed(SERVER)}))
    renewed = await client.one(dhcp(REQUEST, ciaddr=CLIENT))
    assert (renewed.type, renewed.yiaddr, renewed.sent_to) == (ACK, CLIENT, (MAC, CLIENT))
    rebooted = await client.one(dhcp(REQUEST, {50: packed(CLIENT)}))
    assert (rebooted.type, rebooted.yiaddr) == (ACK, CLIENT)
    # iPXE and systemd-networkd have another identifier each; it is the same machine.
    assert (await client.one(dhcp(DISCOVER, {61: b"\xff" + UUID}))).yiaddr == CLIENT
    assert len(client.netdev.leases) == 1


async def test_an_address_that_a_client_cannot_have_is_refused(client: Client) -> None:
    await client.one(dhcp(REQUEST, {50: packed(CLIENT)}))
    for frame in (
        dhcp(REQUEST, {50: packed(CLIENT)}, mac=OTHER),
        dhcp(REQUEST, {50: packed("192.168.1.7")}, mac=OTHER),
        dhcp(REQUEST, {50: packed(SERVER)}, mac=OTHER),
        dhcp(REQUEST, mac=OTHER),
        dhcp(REQUEST, ciaddr="10.0.2.16"),
    ):
        mac = frame[6:12]
        refused = await client.one(frame, mac=mac)
        assert (refused.type, refused.yiaddr, refused.siaddr, refused.file) == (NAK, NOBODY, NOBODY, "")
        assert set(refused.options) == {53, 54}
        assert refused.sent_to == (BROADCAST, EVERYBODY)


async def test_release_decline_and_another_server(client: Client) -> None:
    leases = client.netdev.leases
    await client.one(dhcp(REQUEST, {50: packed(CLIENT)}))
    assert not await client.ask(dhcp(RELEASE, {54: packed(SERVER)}, ciaddr=CLIENT))
    assert len(leases) == 0
    await client.one(dhcp(REQUEST, {50: packed(CLIENT)}))
    assert not await client.ask(dhcp(DECLINE, {50: packed(CLIENT), 54: packed(SERVER)}))
    assert (await client.one(dhcp(DISCOVER))).yiaddr == "10.0.2.16"
    assert not await client.ask(dhcp(REQUEST, {50: packed("10.0.2.99"), 54: packed("10.0.2.3")}))
    assert len(leases) == 0
    assert client.netdev.counters.tx_dropped == 0


async def test_information_without_a_lease(client: Client) -> None:
    reply = await client.one(dhcp(INFORM, ciaddr="10.0.2.200"))
    assert (reply.type, reply.yiaddr, reply.sent_to) == (ACK, NOBODY, (MAC, "10.0.2.200"))
    assert 51 not in reply.options
    assert reply.options[67] == b"vmlinuz"


async def test_a_boot_file_whose_name_is_no_utf8(tmp_path: Path, nursery: trio.Nursery) -> None:
    name = b"k\xff\xe9"
    (tmp_path / os.fsdecode(name)).touch()
    client = Client(BootNetdev(tftp=tmp_path, bootfile=os.fsdecode(name)))
    nursery.start_soon(client.netdev.run, client.sink)
    await trio.testing.wait_all_tasks_blocked()
    (reply,) = await client.ask(dhcp(DISCOVER))
    message = reply[42:]
    assert message[108:236].rstrip(b"\0") == name
    assert b"\x43\x03" + name in message[240:], "option 67 as well"


async def test_leases_outlive_a_reset() -> None:
    client = Client(BootNetdev())
    for kind in (REQUEST, DISCOVER):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.netdev.run, client.sink)
            await trio.testing.wait_all_tasks_blocked()
            options = {50: packed("10.0.2.20")} if kind == REQUEST else {}
            assert (await client.one(dhcp(kind, options))).yiaddr == "10.0.2.20"
            nursery.cancel_scope.cancel()
        assert not client.netdev.put(frame_of(dhcp(DISCOVER))), "nothing is answered without a driver"
    assert client.netdev.counters.tx_packets == 2


@pytest.mark.parametrize(
    "frame",
    [
        dhcp(DISCOVER, giaddr="10.0.3.1"),
        dhcp(None),
        dhcp(OFFER),
        dhcp(99),
        dhcp(RELEASE),
        dhcp(DECLINE, {50: packed(CLIENT), 54: packed("10.0.2.3")}),
    ],
    ids=["from a relay", "BOOTP", "of a server", "unknown", "release of nothing", "decline to another"],
)
async def test_what_is_not_for_it_is_left_alone(client: Client, frame: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert not await client.ask(frame)
    counters = client.netdev.counters
    assert (counters.tx_packets, counters.tx_bytes, counters.tx_drops[Drop.NO_NETWORK]) == (1, len(frame), 1)
    assert not caplog.records


def message(at: int, value: bytes) -> bytes:
    data = bytearray(dhcp_message(DISCOVER))
    data[at : at + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        dhcp_message(DISCOVER)[:239],
        dhcp_message(DISCOVER).ljust(1501, b"\0"),
        message(0, b"\2"),
        message(1, b"\6"),
        message(2, b"\x10"),
        message(28, b"\x01"),
        message(28, bytes(6)),
        message(236, b"\x63\x82\x53\x64"),
        dhcp_message(DISCOVER)[:-1] + b"\x37",
        dhcp_message(DISCOVER)[:-1] + b"\x37\x05\x01",
        dhcp_message(DISCOVER, {53: b""}),
        dhcp_message(DISCOVER, {53: b"\1\1"}),
        dhcp_message(DISCOVER, {50: b"\x0a\0\2"}),
        dhcp_message(DISCOVER, {54: bytes(5)}),
        dhcp_message(DISCOVER)[:-1] + bytes((53, 1, 1, 255)),
    ],
)
async def test_a_message_that_is_none_is_dropped_and_said_once(
    client: Client, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert not await client.ask(udp(data, 67, source_port=68, source=NOBODY, to=EVERYBODY))
    assert client.netdev.counters.tx_dropped == 3
    (record,) = caplog.records
    assert "dropped: DHCP: " in record.getMessage()
    assert len(client.netdev.leases) == 0
