"""A client that is gone at every message of a recorded Linux boot: nothing of it stays, and the next one is served.

``RECORD_BOOT=1 pytest tests/survival/test_recorded_boot.py -k real_qemu`` records the boots anew.
"""

import os
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pytest
import trio
import trio.testing
from support.amounts import Amounts
from support.boot_devices import BOOT_DEVICES, BootDevice, GatedDisk
from support.boot_record import BootRecord, RecordedMessage, recording
from support.boot_replay import Replay
from support.survival_stage import Stage, stage
from support.vm_devices import APPEND

from vfiouser_virtio import serve, vm
from vfiouser_virtio.background import background
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.engines import VfioUserEngine
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.raw.client import HEADER_SIZE
from vfiouser_virtio.transports.pci import NOTIFY, VIRTIO_BAR, VirtioPci

BOOTS = Path(__file__).parent / "boots"

Way = Literal["served", "unread", "half"]
"""How the client goes: its last message was dealt with; it has just come; half of it has come, and then nothing."""
WAYS: tuple[Way, ...] = get_args(Way)


def boot_record(name: str) -> BootRecord:
    return BootRecord.load(BOOTS / f"{name}.jsonl.gz")


def is_notification(message: RecordedMessage) -> bool:
    offset, region = int.from_bytes(message.body[:8], "little"), int.from_bytes(message.body[8:12], "little")
    return message.command == Command.REGION_WRITE and region == VIRTIO_BAR and offset >= NOTIFY


@pytest.mark.diagonal("name", "private")
@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
@pytest.mark.parametrize("name", BOOT_DEVICES)
async def test_client_gone_at_every_message(
    name: str, private: bool, amounts: Amounts, caplog: pytest.LogCaptureFixture
) -> None:
    """By turns in one of the ways; ``--long``: at each message in each."""
    record, device = boot_record(name), BOOT_DEVICES[name]
    number = len(record.messages)
    assert number >= 300, "a whole boot"
    turn = 2 * list(BOOT_DEVICES).index(name) + private
    positions = list(range(turn % amounts.boot_stride, number, amounts.boot_stride))
    busy = 0
    if device.type.name == "blk":
        # From its first request on at every message: with requests under way.
        first = next(at for at, message in enumerate(record.messages) if is_notification(message))
        positions = [each for each in positions if each < first] + list(
            range(first, number, min(amounts.boot_stride, 3))
        )
        busy = sum(each > first for each in positions)
    in_flight = 0
    async with stage(device.make(), device.works, name=name, offer=device.offer) as place:
        with trio.fail_after(600):
            for count, position in enumerate(positions):
                ways = WAYS if amounts.every_way else (WAYS[(count + turn) % len(WAYS)],)
                for way in ways:
                    in_flight += await leave(place, device, record, position, way, private=private)
    assert in_flight >= busy, "requests were under way when the client went"
    assert not [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]


async def leave(place: Stage, device: BootDevice, record: BootRecord, position: int, way: Way, *, private: bool) -> int:
    """One client, from its connection to what is left of it; returns how many requests its disk had under way."""
    disk = place.served.function.device.backend if isinstance(place.served.function.device, Blk) else None
    assert disk is None or isinstance(disk, GatedDisk)
    # What was asked for last is still under way when the client goes.
    notified = [at for at in range(position + 1) if is_notification(record.messages[at])]
    shut = notified[-1] if notified and disk is not None else position
    sizes = [queue.size for queue in place.served.function.core.queues]
    replay = Replay(place.served.connect(), record, device.requests, sizes, private=private)
    with closing(replay):
        async with background() as tasks:
            tasks.start_soon(replay.run)
            await replay.send(0, shut)
            await trio.testing.wait_all_tasks_blocked()
            if disk is not None and notified:
                disk.shut()
            await replay.send(shut, position)
            if way == "half":
                size = replay.length(position)
                cut = (1, HEADER_SIZE // 2, HEADER_SIZE, (HEADER_SIZE + size) // 2, size - 1)[position % 5]
                await replay.send_part(position, min(cut, size - 1))
                await trio.testing.wait_all_tasks_blocked()
                await place.neighbour_works()
                await check_refused(place)
            else:
                await trio.testing.wait_all_tasks_blocked()
                await replay.send(position, position + 1)
                if way == "served":
                    await trio.testing.wait_all_tasks_blocked()
                    await place.neighbour_works()
            under_way = 0 if disk is None else disk.under_way
            replay.close()
            await trio.testing.wait_all_tasks_blocked()
    if disk is not None:
        disk.open()
    assert not [each for each in replay.refused if "GET_IRQ_INFO" not in each], "as QEMU was not"
    await place.check_next()
    return under_way


async def check_refused(place: Stage) -> None:
    """A second client is sent away at once: the silent one is there."""
    with trio.fail_after(60), closing(place.served.connect()) as other:
        other.setblocking(False)
        await trio.lowlevel.wait_readable(other)
        assert other.recv(1) == b""


LOAD = """
    set -e
    for disk in vda vdb; do
        for at in 0 1 2 3 4 5 6 7; do
            dd if=/dev/zero of=/dev/$disk bs=4k count=1 seek=$at conv=fsync
        done
        echo 3 >/proc/sys/vm/drop_caches
        for at in 7 6 5 4 3 2 1 0; do
            dd if=/dev/$disk of=/dev/null bs=4k count=1 skip=$at
        done
    done
    ip link set eth0 up
    echo hello >/dev/hvc0
"""


@pytest.mark.qemu
@pytest.mark.variant
async def test_the_real_qemu_still_boots_like_that(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    """The records are those of a real boot: what today's QEMU and guest say to each device is the same, all in all."""
    records = {
        name: BootRecord(name, ".".join(map(str, qemu.version)), guest_image.kernel.version) for name in BOOT_DEVICES
    }
    traces = {name: recording(record) for name, record in records.items()}
    # Without polling every request is notified of, however quick the machine is.
    functions = [
        VirtioPci(each.make(), name=name, offer=replace(each.offer, poll="off")) for name, each in BOOT_DEVICES.items()
    ]
    engine = VfioUserEngine(open_trace=traces.__getitem__)
    async with (
        serve(*functions, engine=engine) as served,
        vm.boot_guest(qemu, guest_image, devices=served.qemu_devices, append=APPEND, memory_size="256M") as guest,
    ):
        await guest.run(LOAD)
        await guest.poweroff()
    for name, record in records.items():
        if os.environ.get("RECORD_BOOT"):
            record.save(BOOTS / f"{name}.jsonl.gz")
        kept = boot_record(name)
        assert abs(len(record.messages) - len(kept.messages)) < len(kept.messages) // 4, name
        now, then = (Counter(Command(message.command).name for message in each.messages) for each in (record, kept))
        assert now.keys() == then.keys(), name
