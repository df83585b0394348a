"""examples/pci/nvme.py in front of a driver in this process: what it should do, and what no good driver asks for."""

import logging
import random
import struct
from pathlib import Path

import pytest
import trio
from pci.nvme import Nvme
from pci.nvme_admin import AdminCommands
from pci.nvme_formats import Command
from pci.nvme_io import MAX_TASKS
from pci.nvme_queues import MOST_AT_ONCE
from support.blk_device import Recorder
from support.in_process_driver import driving
from support.nvme_driver import CC, CSTS, DATA, ENABLE, FATAL, PAGE, READY, NvmeDriver

from vfiouser_virtio.errors import DeviceError

MIB = 1 << 20
FLUSH, WRITE, READ, WRITE_ZEROES, DATASET_MANAGEMENT = 0x00, 0x01, 0x02, 0x08, 0x09
INVALID_FIELD, INVALID_OPCODE, DATA_TRANSFER_ERROR, INVALID_NAMESPACE, PRP_OFFSET = 0x02, 0x01, 0x04, 0x0B, 0x13
NOWHERE = 0xFEBF_0000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


@pytest.fixture(params=["ram", "file", "direct", "threads"])
def nvme(request: pytest.FixtureRequest, image: Path) -> Nvme:
    if request.param == "ram":
        made = Nvme(size=4 * MIB)
    elif request.param == "direct":
        try:
            made = Nvme(path=image, cache="none", logical_block_size=4096)
        except DeviceError as error:
            pytest.skip(str(error))  # a tmpfs of an old kernel
    else:
        made = Nvme(path=image, aio="threads" if request.param == "threads" else "io_uring")
    return made


@pytest.mark.parametrize("by_message", [False, True], ids=["mapped", "by-message"])
async def test_data_goes_there_and_back(nvme: Nvme, by_message: bool) -> None:
    dice = random.Random(1)
    async with driving(nvme, by_message=by_message) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(size=4)
        block = nvme.disk.block_size
        list_page = 0x60000
        for turn, (length, offset, in_list) in enumerate(
            [
                (block, 0, 0),
                (4096, 0, 0),
                (4096, 512, 0),
                (8192, 0, 0),
                (12288, 1024, 0),
                (65536, 0, 0x200),
                (131072, 4, 0xFE0),
            ]
        ):
            data = dice.randbytes(length)
            pages = [DATA + PAGE * number for number in dice.sample(range(64), length // PAGE + 2)]
            prp1, prp2 = pages[0] + offset, pages[1]
            place = [(prp1, PAGE - offset), *((page, PAGE) for page in pages[1:])]
            if length > 2 * PAGE - offset:
                # A list that begins somewhere in its page, and goes on in the next.
                prp2 = list_page + in_list
                room = (PAGE - in_list) // 8
                entries = pages[1 : -(-(length - PAGE + offset) // PAGE) + 1]
                if len(entries) > room:
                    machine.put(list_page + PAGE, struct.pack(f"<{len(entries) - room + 1}Q", *entries[room - 1 :]))
                    entries = [*entries[: room - 1], list_page + PAGE]
                machine.put(prp2, struct.pack(f"<{len(entries)}Q", *entries))
            left = data
            for address, size in place:
                machine.put(address, left[:size])
                left = left[size:]
            assert await driver.io(pair, WRITE, 64 * turn, length // block, prp1=prp1, prp2=prp2) == 0
            machine.put(DATA, bytes(64 * PAGE))
            assert await driver.io(pair, READ, 64 * turn, length // block, prp1=prp1, prp2=prp2) == 0
            found = b"".join(machine.get(address, size) for address, size in place)
            assert found[:length] == data, (length, offset)
            assert not any(found[length:])
        assert await driver.io(pair, FLUSH, 0, 1) == 0
        assert await driver.io(pair, WRITE, 8, 1, more=1 << 30) == 0
        assert await driver.io(pair, WRITE_ZEROES, 0, PAGE // block) == 0
        assert await driver.io(pair, READ, 0, PAGE // block) == 0
        assert machine.get(DATA, PAGE) == bytes(PAGE)
        machine.put(DATA, struct.pack("<IIQIIQ", 0, 8, 64, 0, 0, 0))
        assert (await driver.do(pair, DATASET_MANAGEMENT, 1, 4, nsid=1, prp1=DATA)).status == 0


async def test_what_it_says_of_itself() -> None:
    async with driving(Nvme(size=4 * MIB, serial="S1", logical_block_size=4096, num_queues=3)) as machine:
        assert machine.read(0, 8) == 0x0000_0020_3C01_03FF
        driver = NvmeDriver(machine)
        await driver.enable()
        assert machine.read(CSTS) == READY
        controller = await driver.identify(1)
        assert controller[4:24] == b"S1".ljust(20)
        assert (controller[77], controller[512:514]) == (8, b"\x66\x44")
        assert controller[768:800].startswith(b"nqn.2014-08.org.nvmexpress:uuid:")
        namespace = await driver.identify(0, nsid=1)
        assert struct.unpack_from("<QQQ", namespace) == (1024, 1024, 1024)
        assert struct.unpack_from("<I", namespace, 128) == (12 << 16,)
        assert struct.unpack_from("<II", await driver.identify(2)) == (1, 0)
        assert struct.unpack_from("<I", await driver.identify(2, nsid=1)) == (0,)
        assert (await driver.identify(3, nsid=1))[:2] == b"\3\x10"
        assert (await driver.command(0x06, 0, nsid=2, prp1=DATA)).status == INVALID_NAMESPACE
        assert (await driver.command(0x06, 0x55, prp1=DATA)).status == INVALID_FIELD
        assert (await driver.command(0x09, 7, 0x000F_000F)).result == 0x0002_0002
        assert (await driver.command(0x0A, 7)).result == 0x0002_0002
        assert (await driver.command(0x0A, 6)).result == 1
        for log, length in ((1, 1024), (2, 512), (3, 512), (5, 4096)):
            assert (await driver.command(0x02, log | (length // 4 - 1) << 16, nsid=0xFFFF_FFFF, prp1=DATA)).status == 0
        assert (await driver.command(0x02, 0x77, prp1=DATA)).status == 0x109


def test_two_disks_are_not_taken_for_two_ways_to_one(tmp_path: Path) -> None:
    serials = set()
    for name in ("a", "b", "a"):
        path = tmp_path / name
        path.write_bytes(bytes(MIB))
        made = Nvme(path=path)
        serials.add(made.serial)
        made.close()
    assert len(serials) == 2


async def test_completions_wait_for_room() -> None:
    """More commands than the completion queue has entries, of a driver that does not take them."""
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(size=4)
        seen: list[int] = []
        wanted = []
        for _ in range(3):
            wanted += [driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA) for _ in range(3)]
            driver.ring(pair)
            await machine.settle()
        # The first ones are there; the driver has not said that it took them.
        seen += [each.cid for each in driver.reap(pair, acknowledge=False)]
        assert len(seen) == 3
        while len(seen) < len(wanted):
            machine.write(0x1004 + 8 * pair.number, pair.head)
            await machine.settle()
            more = driver.reap(pair, acknowledge=False)
            assert more
            seen += [each.cid for each in more]
        assert seen == wanted[: len(seen)]


async def test_intx_follows_completions_and_its_mask() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(vector=2)
        driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA)
        driver.ring(pair)
        await machine.settle()
        assert machine.interrupted
        machine.write(0x0C, 4)
        assert not machine.interrupted
        assert machine.read(0x10) == 4
        machine.write(0x10, 4)
        assert machine.interrupted
        driver.reap(pair)
        assert not machine.interrupted


# What no driver should do


async def test_bad_prps_end_their_command_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with driving(Nvme(size=4 * MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create()
        lists = 0x50000
        machine.put(lists, struct.pack("<511Q", *[DATA] * 511) + struct.pack("<Q", lists))  # leads back to itself
        machine.put(lists + PAGE, struct.pack("<512Q", *[NOWHERE] * 512))
        machine.put(lists + 2 * PAGE, struct.pack("<512Q", *[DATA + 8] * 512))
        machine.put(lists + 4 * PAGE - 8, struct.pack("<Q", lists + 4 * PAGE - 8))  # the last place in its page
        for prp1, prp2, count, status in (
            (DATA + 1, 0, 1, PRP_OFFSET),
            (DATA, DATA + 4, 16, PRP_OFFSET),
            (DATA, lists + 4, 24, PRP_OFFSET),
            (DATA, lists + 2 * PAGE, 24, PRP_OFFSET),
            (DATA, lists + 4 * PAGE - 8, 24, PRP_OFFSET),
            (NOWHERE, 0, 1, DATA_TRANSFER_ERROR),
            (DATA, NOWHERE, 16, DATA_TRANSFER_ERROR),
            (DATA, NOWHERE, 24, DATA_TRANSFER_ERROR),
            (DATA, lists + PAGE, 24, DATA_TRANSFER_ERROR),
            (0xFFFF_FFFF_FFFF_F000, 0, 8, DATA_TRANSFER_ERROR),
            (MIB - PAGE + 2048, MIB, 8, DATA_TRANSFER_ERROR),
            (DATA, lists, 4096, INVALID_FIELD),  # 2 MiB
            (DATA, lists, 2048, 0),  # a loop is no longer than the data
        ):
            for opcode in (READ, WRITE):
                assert await driver.io(pair, opcode, 0, count, prp1=prp1, prp2=prp2) == status, (prp1, prp2, count)
        assert await driver.io(pair, READ, 0, 1) == 0
        assert machine.read(CSTS) == READY
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


async def test_bad_commands_have_their_status() -> None:
    async with driving(Nvme(size=MIB, num_queues=4)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create()
        for block, count, status in ((2048, 1, 0x80), (2047, 2, 0x80), (0xFFFF_FFFF_FFFF_FFFF, 1, 0x80), (2047, 1, 0)):
            for opcode in (READ, WRITE, WRITE_ZEROES):
                assert await driver.io(pair, opcode, block, count) == status
        assert (await driver.do(pair, READ, 0, 0, 0, nsid=2, prp1=DATA)).status == INVALID_NAMESPACE
        assert (await driver.do(pair, READ, 0, 0, 0, nsid=1, prp1=DATA, flags=0x40)).status == INVALID_FIELD
        assert (await driver.do(pair, 0x7F, nsid=1)).status == INVALID_OPCODE
        machine.put(DATA, struct.pack("<IIQ", 0, 8, 2044))
        assert (await driver.do(pair, DATASET_MANAGEMENT, 0, 4, nsid=1, prp1=DATA)).status == 0x80
        create_cq, create_sq = 0x05, 0x01
        for opcode, where, more, prp1, status in (
            (create_cq, 0xF_0001, 3, 0x9000, 0x101),  # is there
            (create_cq, 0xF_0000, 3, 0x9000, 0x101),
            (create_cq, 0xF_0005, 3, 0x9000, 0x101),
            (create_cq, 0x0_0002, 3, 0x9000, 0x102),
            (create_cq, 0x400_0002, 3, 0x9000, 0x102),
            (create_cq, 0xF_0002, 2, 0x9000, INVALID_FIELD),
            (create_cq, 0xF_0002, 3, 0x9010, PRP_OFFSET),
            (create_cq, 0xF_0002, 3 | 65 << 16, 0x9000, 0x108),
            (create_sq, 0xF_0002, 1 | 3 << 16, 0x4000, 0x100),
            (create_sq, 0xF_0002, 1 | 0 << 16, 0x4000, 0x100),
            (create_sq, 0xF_0001, 1 | 1 << 16, 0x4000, 0x101),
            (0x04, 1, 0, 0, 0x10C),  # deleted before its submission queue
            (0x04, 3, 0, 0, 0x101),
            (0x00, 0, 0, 0, 0x101),
            (0x00, 9, 0, 0, 0x101),
            (0x7F, 0, 0, 0, INVALID_OPCODE),
            (0x09, 0x55, 0, 0, INVALID_FIELD),
            (0x0A, 0x55, 0, 0, INVALID_FIELD),
            (0x09, 1 << 31 | 6, 0, 0, 0x10D),
            (0x02, 0xFFFF_0001, 0xFFFF, DATA, INVALID_FIELD),
            (0x06, 1, 0, NOWHERE, DATA_TRANSFER_ERROR),
            (0x06, 1, 0, DATA + 2, PRP_OFFSET),
        ):
            assert (await driver.command(opcode, where, more, prp1=prp1)).status == status, (opcode, where, more)
        assert (await driver.command(0x00, 1)).status == 0
        assert (await driver.command(0x04, 1)).status == 0
        assert (await driver.command(0x08, 1)).result == 1


async def test_doorbells_that_cannot_be_are_events() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine, admin_size=2)
        await driver.enable()
        pair = await driver.create(size=4)
        machine.write(0x1000 + 8, 4)  # as many as it has entries
        machine.write(0x1004 + 8, 1)  # more than there were completions
        machine.write(0x1000 + 8 * 9, 1)  # no such queue
        await machine.settle()
        # Requests for events wait outside of the queue, which has one place; a fifth is too many.
        assert (await driver.command(0x0C)).result == 0x0001_0100
        assert (await driver.command(0x0C)).result == 0x0001_0000
        waiting = []
        for _ in range(4):
            waiting.append(driver.submit(driver.admin, 0x0C))
            driver.ring(driver.admin)
            await machine.settle()
        assert driver.reap(driver.admin) == []
        assert (await driver.command(0x0C)).status == 0x105
        machine.write(0x1004 + 8, 99)
        await machine.settle()
        [event] = driver.reap(driver.admin)
        assert (event.cid, event.result) == (waiting[0], 0x0001_0100)
        assert await driver.io(pair, READ, 0, 1) == 0


@pytest.mark.parametrize(("asq", "acq"), [(NOWHERE, 0x2000), (0x1000, NOWHERE), (0xFFFF_FFFF_FFFF_F000, 0x2000)])
async def test_queues_that_are_not_in_memory_are_fatal_until_a_reset(
    asq: int, acq: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable(asq=asq, acq=acq)
        driver.submit(driver.admin, 0x06, 1, prp1=DATA)
        for _ in range(100):
            driver.ring(driver.admin)
            await machine.settle()
        assert machine.read(CSTS) == READY | FATAL
        await driver.disable()
        assert machine.read(CSTS) == 0
        await driver.enable()
        await driver.identify(1)
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("cc", [0x0046_0011, 0x0046_0081, 0x0046_0801])
async def test_what_it_cannot_be_is_fatal(cc: int) -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable(cc=cc)
        assert machine.read(CSTS) == FATAL
        await driver.disable()
        await driver.enable()
        assert machine.read(CSTS) == READY


async def test_a_shutdown_is_told_and_a_reset_ends_it() -> None:
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        machine.write(CC, ENABLE | 1 << 14)
        await machine.settle()
        assert machine.read(CSTS) == READY | 2 << 2
        await driver.disable()
        assert machine.read(CSTS) == 0
        machine.set_command(2)  # without Bus Master there is no run
        await machine.settle()
        machine.write(CC, ENABLE | 1 << 14)
        assert machine.read(CSTS) == 2 << 2
        machine.write(CC, 0)
        assert machine.read(CSTS) == 0


async def test_what_was_fetched_before_a_reset_is_not_done_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """A deletion that waits for requests, and a command of before, when the queues are gone."""
    nvme = Nvme(size=MIB)
    async with driving(nvme) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(size=4)
        admin, queue = nvme.engine.submission[0], nvme.engine.submission[pair.number]
        queue.under_way = 1  # a request that the host has not ended
        driver.submit(driver.admin, 0x00, pair.number)
        driver.ring(driver.admin)
        await machine.settle()
        assert driver.reap(driver.admin) == []
        assert queue.when_idle is not None
        await driver.disable()
        queue.when_idle()
        event = Command(0x0C, 0, 7, *[0] * 11)
        await AdminCommands(nvme).perform(admin, event)
        await driver.enable()
        await driver.identify(1)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_random_commands_and_registers_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    dice = random.Random(7)
    async with driving(Nvme(size=MIB)) as machine:
        driver = NvmeDriver(machine)
        for _ in range(30):
            await driver.enable()
            pair = await driver.create()
            machine.put(DATA, dice.randbytes(16 * PAGE))
            for _ in range(30):
                queue = dice.choice([driver.admin, pair])
                words = [dice.choice([0, 1, 2, dice.getrandbits(32), dice.randrange(1 << 12)]) for _ in range(6)]
                driver.submit(
                    queue,
                    dice.choice([dice.randrange(16), dice.randrange(256)]),
                    *words,
                    nsid=dice.choice([0, 1, 0xFFFF_FFFF]),
                    prp1=dice.choice([DATA, DATA + dice.randrange(PAGE), dice.getrandbits(64)]),
                    prp2=dice.choice([DATA + PAGE, DATA + 8 * dice.randrange(512), dice.getrandbits(64)]),
                    flags=dice.choice([0, 0, 0, 0x40, 1]),
                )
                driver.ring(queue)
                if dice.random() < 0.2:
                    machine.write(0x1000 + 4 * dice.randrange(140), dice.choice([0, 1, 15, 16, dice.getrandbits(32)]))
                await machine.settle()
            await driver.disable()
            assert machine.read(CSTS) == 0
        await driver.enable()
        pair = await driver.create()
        assert await driver.io(pair, READ, 0, 1) == 0
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nvme needs path=FILE or size=SIZE"),
        ({"size": MIB, "num_queues": 65}, "num-queues"),
        ({"size": MIB, "logical_block_size": 8192}, "logical-block-size"),
        ({"size": MIB, "serial": "x" * 21}, "serial"),
        ({"size": MIB + 512, "logical_block_size": 4096}, "multiple"),
    ],
)
def test_options_that_cannot_be(options: dict[str, int | str], words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        Nvme(**options)  # type: ignore[arg-type] # one of several


async def test_commands_that_have_a_task_each_are_bounded_and_all_are_carried_out() -> None:
    """A reset cancels all of them in one go, for which all devices of the process wait: there could be 65,536."""
    backend = Recorder(MIB)
    backend.gate = trio.Event()
    async with driving(Nvme(backend=backend)) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pairs = [await driver.create(number, size=64) for number in range(1, 6)]
        for pair in pairs:
            for _ in range(63):
                driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA)
            driver.ring(pair)
        await machine.settle()
        assert MAX_TASKS <= len(backend.calls) < MAX_TASKS + MOST_AT_ONCE
        assert (await driver.command(0x0A, 0x07)).status == 0  # Get Features, of the admin queue
        backend.gate.set()
        for _ in range(3):
            await machine.settle()
        for pair in pairs:
            driver.reap(pair)
            assert [each.status for each in pair.done] == [0] * 63
        # And none is left to count after a reset.
        backend.gate = trio.Event()
        for pair in pairs:
            driver.submit(pair, READ, 0, 0, 0, nsid=1, prp1=DATA)
            driver.ring(pair)
        await machine.settle()
        await driver.disable()
        backend.gate = None
        await driver.enable()
        assert await driver.io(await driver.create(), READ, 0, 1) == 0


async def test_long_commands_let_others_have_their_turns() -> None:
    """32 of 1 MiB each, fetched at once, took 5 ms and more in one go."""
    controller = Nvme(size=4 * MIB)
    backlog: list[int] = []

    async def other() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            queues = controller.engine.submission.values()
            backlog.append(sum(1 for queue in queues if queue.number and queue.under_way))

    async with driving(controller) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(size=64)
        machine.put(DATA, struct.pack("<255Q", *[DATA + PAGE] * 255))  # all of it into one page
        for _ in range(MOST_AT_ONCE):
            driver.submit(pair, READ, 0, 0, 2047, nsid=1, prp1=DATA + 2 * PAGE, prp2=DATA)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            driver.ring(pair)
            while not backlog or backlog[-1] or len(pair.done) < MOST_AT_ONCE:
                await trio.lowlevel.checkpoint()
                driver.reap(pair)
            nursery.cancel_scope.cancel()
        assert [each.status for each in pair.done] == [0] * MOST_AT_ONCE
        assert sum(backlog) >= 3, "rounds of the loop in the midst of these"
