"""Every switch of the rings, with a real Linux: what it negotiates, and data through each, written and read.

All disks are in one guest. The data goes from a first disk through all the others to a last one, so each of them is
written once and read once, and after every step the host compares files.
"""

import logging
import os
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from support.amounts import Amounts
from support.vm_devices import MIB, Machine, booted_from_options, difference, fill, sparse, talk

from vfiouser_virtio import vm
from vfiouser_virtio.protocols.virtio.features import Feature, is_device_type_bit

pytestmark = pytest.mark.qemu

log = logging.getLogger(__name__)

DEFAULT = frozenset({Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET})
PACKED = DEFAULT | {Feature.RING_PACKED}
INDIRECT, EVENT_IDX, IN_ORDER = {Feature.INDIRECT_DESC}, {Feature.EVENT_IDX}, {Feature.IN_ORDER}

# A device's options, and what Linux negotiates of the features that belong to no device type.
SWITCHES: dict[str, frozenset[Feature]] = {
    "": DEFAULT,
    "event-idx=off": DEFAULT - EVENT_IDX,
    "indirect-desc=off": DEFAULT - INDIRECT,
    "event-idx=off,indirect-desc=off,queue-reset=off": frozenset({Feature.VERSION_1}),
    "packed=on": PACKED,
    "packed=on,event-idx=off": PACKED - EVENT_IDX,
    "packed=on,indirect-desc=off": PACKED - INDIRECT,
    "packed=on,event-idx=off,indirect-desc=off": PACKED - EVENT_IDX - INDIRECT,
    "in-order=on": DEFAULT | IN_ORDER,
    "in-order=on,event-idx=off,indirect-desc=off": DEFAULT - EVENT_IDX - INDIRECT | IN_ORDER,
    "in-order=on,packed=on": PACKED | IN_ORDER,
    "in-order=on,packed=on,indirect-desc=off": PACKED - INDIRECT | IN_ORDER,
    "notification-data=on": DEFAULT | {Feature.NOTIFICATION_DATA},
    "notification-data=on,packed=on": PACKED | {Feature.NOTIFICATION_DATA},
    "iommu-platform=on": DEFAULT | {Feature.ACCESS_PLATFORM},
    "queue-size=2": DEFAULT,
    "queue-size=16,indirect-desc=off": DEFAULT - INDIRECT,
    "queue-size=1024": DEFAULT,
    "packed=on,queue-size=100": PACKED,
    "notif-config-data=on,suspend=on": DEFAULT,
    "poll=off": DEFAULT,
    "packed=on,in-order=on,notification-data=on,iommu-platform=on,poll=off": PACKED
    | {Feature.IN_ORDER, Feature.NOTIFICATION_DATA, Feature.ACCESS_PLATFORM},
}
# No Linux up to 7.3 has a driver side for these; one that has is welcome.
NOT_IN_LINUX = {Feature.NOTIF_CONFIG_DATA, Feature.SUSPEND}
# Debian's kernels: the default one, and the newest, and what the older does not know.
KERNELS = {"trixie": IN_ORDER, "trixie-backports": set[Feature]()}


@pytest.mark.variant  # the plain run shows each switch without a VM: tests/transports, tests/behaviour
@pytest.mark.parametrize(("kernel", "memory"), [("trixie-backports", "shared"), ("trixie", "private")])
async def test_data_through_every_switch(
    qemu: vm.Qemu,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    long_run: bool,
    amounts: Amounts,
    kernel: str,
    memory: str,
) -> None:
    # Through messages it is a tenth as fast.
    size = amounts.every_switch if memory == "shared" else (64 if long_run else 2) * MIB
    image = await trio.to_thread.run_sync(vm.guest_image, kernel)
    source = tmp_path / "source"
    fill(source, size)
    disks = {switches: sparse(tmp_path / (switches.replace(",", " ") or "as it comes"), size) for switches in SWITCHES}
    sink = sparse(tmp_path / "sink", size)
    options = [f"path={source}", *(f"path={path},{switches}".rstrip(",") for switches, path in disks.items())]
    devices = [f"blk,{option}" for option in [*options, f"path={sink}"]]
    async with booted_from_options(qemu, image, devices, memory=memory, cpus=2) as machine:
        await check_negotiated(machine, KERNELS[kernel])
        await check_ring_sizes(machine)
        paths = [source, *disks.values(), sink]
        await pass_on(machine, paths, size)
        await bind_again(machine, range(1, len(paths) - 1))
        await check_negotiated(machine, KERNELS[kernel])
        if memory == "shared":
            # All but the first and the last are empty now.
            await pass_on(machine, paths, 2 * MIB)
        await machine.check_quiet(caplog)
    for path in paths:
        path.unlink()  # pytest keeps the files of three runs


@pytest.mark.variant
async def test_entropy_and_console_with_every_switch(
    qemu: vm.Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = await trio.to_thread.run_sync(vm.guest_image, "trixie-backports")
    # A guest has room for 31 devices.
    chosen = [switches for switches in SWITCHES if "packed=on" in switches or "," not in switches]
    random = tmp_path / "random"
    random.write_bytes(os.urandom(64 << 10))
    for start in range(0, len(chosen), 12):
        some = dict(enumerate(chosen[start : start + 12]))
        devices = [f"rng,source={random},{switches}".rstrip(",") for switches in some.values()]
        devices += [
            f"console,chardev=unix:{tmp_path / str(number)},name=p{number},{switches}".rstrip(",")
            for number, switches in some.items()
        ]
        async with booted_from_options(qemu, image, devices) as machine:
            for number, switches in some.items():
                for device in (number, number + len(some)):
                    found = ring_features(await machine.run(f"cat /sys/bus/virtio/devices/virtio{device}/features"))
                    assert found == SWITCHES[switches], f"{devices[device]}"
                await machine.run(f"echo virtio_rng.{number} >/sys/class/misc/hw_random/rng_current")
                read = await machine.guest.run("dd if=/dev/hwrng bs=16 count=64 2>/dev/null", check=True)
                assert read.raw_output[-16:] in random.read_bytes(), switches
                async with await trio.open_unix_socket(tmp_path / str(number)) as stream:
                    await talk(machine, stream, f"p{number}")
            await machine.check_quiet(caplog)


async def test_disks_that_poll(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture, amounts: Amounts
) -> None:
    """They look at their queues all the time, and ask for no notifications."""
    size = amounts.polled
    paths = [tmp_path / name for name in ("source", "split", "packed", "in-order", "sink")]
    fill(paths[0], size)
    for path in paths[1:]:
        sparse(path, size)
    options = ["", ",poll=on", ",poll=on,packed=on", ",poll=on,in-order=on", ""]
    devices = [f"blk,path={path}{option}" for path, option in zip(paths, options, strict=True)]
    async with booted_from_options(qemu, guest_image, devices, cpus=2) as machine:
        await pass_on(machine, paths, size)
        await machine.check_quiet(caplog)


def disk(number: int) -> str:
    """The guest's name of a disk, counted from 0."""
    return f"vd{chr(ord('a') + number)}"


def ring_features(shown: str) -> set[Feature]:
    """The reserved features in sysfs' string of 0 and 1, bit 0 first; 64 of them, or 128 in newer kernels."""
    bits = {bit for bit, digit in enumerate(shown.strip()) if digit == "1"}
    return {Feature(bit) for bit in bits if not is_device_type_bit(bit)} - NOT_IN_LINUX


async def check_negotiated(machine: Machine, unknown: set[Feature]) -> None:
    """What the guest says that it has negotiated with each disk."""
    files = [f"/sys/block/{disk(number)}/device/features" for number in range(1, len(SWITCHES) + 1)]
    shown = (await machine.run(f"cat {' '.join(files)}")).splitlines()
    for line, (switches, expected) in zip(shown, SWITCHES.items(), strict=True):
        assert ring_features(line) == expected - unknown, f"blk,{switches}"


async def check_ring_sizes(machine: Machine) -> None:
    """How many requests Linux keeps in each disk's queue: one an entry, or half of that without indirect ones."""
    for number, switches in enumerate(SWITCHES, 1):
        if "queue-size=" in switches:
            entries = int(switches.split("queue-size=")[1].split(",")[0])
            tags = int(await machine.run(f"cat /sys/block/{disk(number)}/mq/0/nr_tags"))
            assert tags == (entries // 2 if "indirect-desc=off" in switches else entries), switches


async def pass_on(machine: Machine, paths: list[Path], size: int) -> None:
    """From the first disk to the next, and so on to the last; those in between are empty afterwards."""
    for number, (source, target) in enumerate(pairwise(paths)):
        started = time.monotonic()
        # What was there before is no longer needed: in the same command, as each costs time of its own.
        before = f"blkdiscard /dev/{disk(number - 1)}" if number > 1 else ""
        await copy(machine, disk(number), disk(number + 1), size, before)
        # For people who ask with --log-cli-level=info.
        log.info("%s to %s: %.0f MiB/s", source.name, target.name, size / MIB / (time.monotonic() - started))
        assert await difference(source, target, size) == ""
    await machine.run(f"blkdiscard /dev/{disk(len(paths) - 2)}")


async def copy(machine: Machine, source: str, target: str, size: int, before: str) -> None:
    """Four jobs at once, a quarter each, with requests of other sizes, around the guest's page cache."""
    quarter = size // 4
    jobs = [
        f"dd if=/dev/{source} of=/dev/{target} bs={block} count={quarter // block} iflag=direct oflag=direct "
        f'skip={number * quarter // block} seek={number * quarter // block} & jobs="$jobs $!"'
        for number, block in enumerate((32 << 10, MIB // 4, MIB // 2, MIB // 2))
    ]
    # `set -e` would not look at what ran in the background.
    await machine.run("\n".join([before, *jobs, "for job in $jobs; do wait $job; done"]), timeout=1200)


async def bind_again(machine: Machine, numbers: Iterable[int]) -> None:
    """The driver leaves each of the disks, which resets it, and comes back."""
    await machine.run(f"""
        for name in {" ".join(map(disk, numbers))}; do
            device=$(readlink -f /sys/block/$name/device)
            echo ${{device##*/}} >/sys/bus/virtio/drivers/virtio_blk/unbind
            [ ! -e /dev/$name ]
            echo ${{device##*/}} >/sys/bus/virtio/drivers/virtio_blk/bind
            [ -b /dev/$name ]
        done
    """)
