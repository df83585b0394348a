"""Bugs of other products' devices, tried here: docs/known-bugs.md has the list."""

import tracemalloc
from itertools import product
from pathlib import Path

import pytest
import trio
from support.hostile import Rings, attacked, both_rings
from support.hostile_requests import (
    CONTROL,
    FRAME,
    READ,
    RX,
    SECTORS,
    TX,
    WRITE_OUT,
    again_in,
    blk_header,
    blk_segment,
    disk_in,
    net_header,
    one_byte_each,
    request,
    status_of,
)

from vfiouser_virtio.devices.rng import MAX_BYTES_PER_CHAIN, Rng
from vfiouser_virtio.protocols.virtio.blk import BlkStatus, RequestType
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.net import CtrlClass, CtrlMac, CtrlMq, GsoType, HdrFlags
from vfiouser_virtio.testing.fuzz import TARGETS, FuzzTarget
from vfiouser_virtio.testing.raw.ring import WRITE


@both_rings
async def test_cve_2021_3748_receive_buffers_that_go_away(rings: Rings) -> None:
    """CVE-2021-3748, QEMU: num_buffers was written after the buffer had been unmapped."""
    async with attacked("net", rings) as attack:
        for name in range(4):
            attack.put((0x38000 + 64 * name, 64, WRITE), queue=RX, name=name)
        await attack.kick(RX)
        await attack.performer.do_unmap([1])
        address = 0x20000
        attack.ram.write(address, net_header(attack.driver.features) + FRAME * 2)
        attack.put((address, 24 + len(FRAME) * 2, 0), queue=TX)
        await attack.kick(TX)
        await attack.settle()
        await attack.performer.do_map([1])
        await attack.settle()


@both_rings
async def test_cve_2024_8612_a_used_length_of_what_was_written(rings: Rings) -> None:
    """CVE-2024-8612, QEMU: a request that failed had the length of one that had not, and old bytes for contents."""
    async with attacked("blk", rings) as attack:
        done = await request(attack, [blk_header(READ, SECTORS)], [512, 1])
        assert done is not None
        length, (data, status) = done
        assert status[0] == BlkStatus.IOERR
        assert length in (0, 1)
        if length:
            assert data == bytes(512)


@both_rings
async def test_cve_2022_2132_a_header_in_many_descriptors(rings: Rings) -> None:
    """CVE-2022-2132, DPDK: a header over more than two descriptors left the loop that read it with wrong lengths."""
    async with attacked("blk", rings) as attack:
        header = blk_header(READ)
        for count in (1, 3, 12):
            pieces = [header[16 * n // count : 16 * (n + 1) // count] for n in range(count)]
            assert await status_of(attack, pieces, [512, 1]) == BlkStatus.OK
    async with attacked("net", rings) as attack:
        packet = net_header(attack.driver.features) + FRAME
        assert await request(attack, [*one_byte_each(packet[:13]), packet[13:]], [], TX)


@both_rings
async def test_cve_2022_2132_a_chain_no_longer_than_its_header(rings: Rings) -> None:
    """CVE-2022-2132, DPDK: a chain that ends with its header, or within it."""
    async with attacked("net", rings) as attack:
        for length in (1, 11, 12, 15, 24):
            assert await request(attack, [bytes(length)], [], TX)


@both_rings
async def test_cve_2024_11614_a_checksum_outside_of_its_packet(rings: Rings) -> None:
    """CVE-2024-11614, DPDK vhost: csum_start and csum_offset were believed."""
    async with attacked("net", rings) as attack:
        for start, offset in ((0, 0xFFFF), (0xFFFF, 0xFFFF), (64, 0), (63, 0), (62, 1), (0xFFFF, 0)):
            header = net_header(attack.driver.features, flags=HdrFlags.NEEDS_CSUM, csum_start=start, csum_offset=offset)
            assert await request(attack, [header + FRAME], [], TX)


async def test_dpdk_2026_a_segment_size_that_is_none() -> None:
    """DPDK, 2026, without a number: gso_size 0 was divided by."""
    async with attacked("net") as attack:
        for room in range(4):
            attack.driver.offer(RX, [], [64 << room])
        for kind, size in product((GsoType.TCPV4, GsoType.UDP_L4, GsoType.TCPV6, 0x7F), (0, 1, 0xFFFF)):
            header = net_header(
                attack.driver.features,
                flags=HdrFlags.NEEDS_CSUM,
                gso_type=kind,
                gso_size=size,
                hdr_len=54,
                csum_start=34,
                csum_offset=16,
            )
            assert await request(attack, [header + FRAME * 8], [], TX)


@both_rings
async def test_dpdk_2026_a_command_that_ends_early(rings: Rings) -> None:
    """DPDK, 2026, without a number: a control command was read behind the end of its chain."""
    async with attacked("net", rings) as attack:
        for command in (b"", b"\0", b"\1\0", b"\1\0" + b"\xff" * 4, b"\4\1" + b"\xff" * 8):
            done = await request(attack, one_byte_each(command) or [b""], [1], CONTROL)
            assert done is not None
            assert done[1] == [b"\1"]


def test_ghsa_jmr4_g2hv_mjj6_a_disk_is_never_taken_for_an_image(tmp_path: Path) -> None:
    """GHSA-jmr4-g2hv-mjj6, Cloud Hypervisor: a guest wrote the header of an image format, with a backing file, and had
    the host's file the next time."""
    secret, path = tmp_path / "secret", tmp_path / "disk"
    secret.write_bytes(b"secret" * 100)
    name = str(secret).encode()
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + (104).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    contents = header.ljust(104, b"\0") + name

    async def attack_twice() -> None:
        async with attacked(disk_in(path)) as attack:
            assert await status_of(attack, [blk_header(WRITE_OUT), contents.ljust(1024, b"\0")], [1]) == BlkStatus.OK
            attack.bounds.forget()
            before = path.read_bytes()[:1024]
        assert before == contents.ljust(1024, b"\0")
        async with attacked(again_in(path)) as attack:
            done = await request(attack, [blk_header(READ)], [1024, 1])
            assert done is not None
            assert done[1] == [before, b"\0"]

    trio.run(attack_twice)


@both_rings
async def test_firecracker_a_request_for_random_bytes_without_end(rings: Rings) -> None:
    """Firecracker (its change log): a guest's request for entropy had as much of the host's memory as it asked for."""
    async with attacked("rng", rings) as attack:
        attack.put(attack.indirect([(0x20000, 0x28000, WRITE)] * 64))
        assert await attack.length_of() == MAX_BYTES_PER_CHAIN


async def test_firecracker_a_descriptor_of_statistics_that_says_nothing() -> None:
    """Firecracker (its change log): a descriptor of the balloon's statistics stopped the loop that took them."""
    async with attacked("balloon") as attack:
        for data in (b"", b"\0" * 9, b"\xff" * 10, b"\xff" * 4096):
            attack.put((*attack.readable(data or b"x")[:1], len(data), 0), queue=2)
            await attack.kick(2)
            await attack.settle()
        await attack.performer.do_bring_up()


@both_rings
async def test_firecracker_a_block_request_that_lacks_a_descriptor(rings: Rings) -> None:
    """Firecracker (its change log): the check of a block request's descriptors was off by one."""
    async with attacked("blk", rings) as attack:
        for writable in ([], [512], [513], [511, 1]):
            await request(attack, [blk_header(READ)], writable)
            await attack.performer.do_bring_up()
            assert await request(attack, [blk_header(READ)[:15]], writable) is None
            await attack.performer.do_bring_up()


@pytest.mark.parametrize(
    ("device", "queue", "head"),
    [
        ("blk", 0, blk_header(WRITE_OUT)),
        ("blk", 0, blk_header(RequestType.DISCARD)),
        ("net", TX, b""),
        ("net", CONTROL, bytes([CtrlClass.MAC, CtrlMac.TABLE_SET])),
        ("console", 1, b""),
        ("console", 3, b""),
        ("balloon", 0, b""),
        ("balloon", 2, b""),
        ("input", 1, b""),
        ("rng", 0, b""),
    ],
)
async def test_openbsd_vmd_lengths_of_a_guest_are_no_allocations(device: str, queue: int, head: bytes) -> None:
    """OpenBSD vmd: lengths that a guest gave decided how much was copied. Here: 32 MB of one chain."""
    async with attacked(device) as attack:
        segments = [attack.readable(head)] if head else []
        attack.ram.write(0x20000, bytes(0x10000))
        segments += [(0x20000, 0x10000, 0)] * 512 + [(0x30000, 64, WRITE)]
        tracemalloc.start()
        attack.put(attack.indirect(segments), queue=queue)
        await attack.kick(queue)
        await attack.settle()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20


async def test_cve_2020_27174_output_that_is_not_read() -> None:
    """CVE-2020-27174, Firecracker: what a guest sent to its serial console, and was not read, grew without bound."""
    async with attacked("console") as attack:
        device = attack.function.device
        tracemalloc.start()
        for _ in range(2000):
            device.config_written("emerg_wr", 0x41)
        for _ in range(20):
            attack.driver.offer(1, [bytes(0x2000)], [])
            await attack.kick(1)
            await attack.settle()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20


@both_rings
async def test_cve_2020_16843_a_network_without_receive_buffers(rings: Rings) -> None:
    """CVE-2020-16843, Firecracker: a network device stopped for good when more came in than it had room for."""
    async with attacked("net", rings) as attack:
        packet = net_header(attack.driver.features) + FRAME
        for _ in range(40):
            assert await request(attack, [packet], [], TX)
        for _ in range(8):
            attack.driver.offer(RX, [], [2048])
        await attack.kick(RX)
        await attack.settle()
        assert attack.driver.collect(attack.driver.rings[RX])


@both_rings
async def test_cve_2022_26354_a_request_that_fails_comes_back(rings: Rings) -> None:
    """CVE-2022-26354, QEMU vsock: a request that was refused was neither completed nor freed."""
    async with attacked("blk", rings) as attack:
        for _ in range(40):
            assert await status_of(attack, [blk_header(WRITE_OUT, SECTORS), bytes(512)], [1]) == BlkStatus.IOERR


async def test_cve_2026_48914_and_5761_block_requests_that_are_not_offered() -> None:
    """CVE-2026-48914 and CVE-2026-5761, QEMU: sizes of a SCSI_CMD; a zone report as large as its buffer."""
    async with attacked("blk") as attack:
        for kind in (2, 3, 10, 12, 14, 15, 16, 17, 18, 20, 22, 24, 26, 0x8000_0000, 0xFFFF_FFFF):
            for readable, writable in (([b"x" * 32], [0x2000, 1]), ([], [1]), ([b"x"], [3, 1])):
                assert await status_of(attack, [blk_header(kind), *readable], writable) == BlkStatus.UNSUPP


@both_rings
async def test_cve_2026_50624_a_reset_while_random_bytes_are_made(rings: Rings) -> None:
    """CVE-2026-50624, QEMU rng: bytes that came after a reset went into a request that had been freed."""
    random = FuzzTarget(lambda: Rng(source=Path("/dev/urandom")), TARGETS["rng"].works, TARGETS["rng"].type)
    async with attacked(random, rings) as attack:
        for _ in range(5):
            attack.put(attack.writable(0x4000))
            await attack.kick()
            attack.set(device_status=0)
            await attack.settle()
            attack.bounds.check()
            attack.bounds.forget()
            before = attack.ram.read(0x20000, 0x8000)
            await trio.lowlevel.checkpoint()
            assert attack.ram.read(0x20000, 0x8000) == before
            await attack.performer.do_bring_up()


@pytest.mark.parametrize("room", [12, 60])
@both_rings
async def test_cve_2015_7295_a_frame_that_has_no_room(rings: Rings, room: int) -> None:
    """CVE-2015-7295, QEMU: a jumbo frame for a driver without mergeable buffers; and a header that has no room."""
    async with attacked("net", rings) as attack:
        for _ in range(8):
            attack.driver.offer(RX, [], [room])
        await attack.kick(RX)
        attack.driver.offer(TX, [net_header(attack.driver.features) + FRAME * 100], [])
        await attack.kick(TX)
        await attack.settle()


@pytest.mark.parametrize("room", [0, 1, 19, 23], ids=str)
async def test_cve_2023_6693_a_receive_buffer_shorter_than_the_header(room: int) -> None:
    """CVE-2023-6693, QEMU: a header with a hash was copied onto the stack, whatever its length."""
    async with attacked("net") as attack:
        attack.put((0x38000, room, WRITE), queue=RX)
        await attack.kick(RX)
        attack.driver.offer(TX, [net_header(attack.driver.features) + FRAME], [])
        await attack.kick(TX)
        await attack.settle()


def rss(mask: int, queues: list[int], unclassified: int = 0, pairs: int = 1, key: int = 40) -> bytes:
    data = (0).to_bytes(4, "little") + mask.to_bytes(2, "little") + unclassified.to_bytes(2, "little")
    data += b"".join(queue.to_bytes(2, "little") for queue in queues)
    return bytes([CtrlClass.MQ, CtrlMq.RSS_CONFIG]) + data + pairs.to_bytes(2, "little") + bytes([key]) + bytes(key)


async def test_cve_2024_6505_a_table_of_receive_queues_that_lies() -> None:
    """CVE-2024-6505, QEMU: an index of the RSS table was not checked."""
    lies = {
        "mask": rss(0xFFFF, [0] * 16),
        "queue": rss(3, [0, 1, 2, 0xFFFF]),
        "no power of two": rss(2, [0, 0, 0]),
        "unclassified": rss(0, [0], unclassified=0xFFFF),
        "no pairs": rss(0, [0], pairs=0),
        "pairs": rss(0, [0], pairs=0x8000),
        "key": rss(0, [0], key=255),
        "short table": rss(7, [0]),
        "short key": rss(0, [0])[:-1],
    }
    async with attacked("net") as attack:
        for name, command in lies.items():
            done = await request(attack, [command], [1], CONTROL)
            assert done is not None
            assert done[1] == [b"\1"], name
        attack.driver.offer(RX, [], [2048])
        assert await request(attack, [net_header(attack.driver.features) + FRAME], [], TX)


@both_rings
async def test_ch_8388_a_range_of_sectors_that_overflows(rings: Rings) -> None:
    """Cloud Hypervisor pull request 8388: the first and the number of sectors were added up, and had overflowed."""
    async with attacked("blk", rings) as attack:
        for kind in (RequestType.WRITE_ZEROES, RequestType.DISCARD):
            for segment in (blk_segment((1 << 64) - 1, 1), blk_segment(SECTORS, 1), blk_segment(1, 0xFFFF_FFFF)):
                assert await status_of(attack, [blk_header(kind), segment], [1]) != BlkStatus.OK
        for sector in ((1 << 64) - 1, (1 << 55) - 1, 1 << 55, SECTORS - 1):
            assert await status_of(attack, [blk_header(READ, sector)], [1024, 1]) == BlkStatus.IOERR
        assert not await attack.status() & DeviceStatus.NEEDS_RESET
