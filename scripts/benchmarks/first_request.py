"""Benchmark of the first request: connect, negotiate, bind the driver and read one block, without a VM."""

import time
from functools import partial

import trio

from benchmarks.measure import Benchmark, Options, Row, at_most, in_turn
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.guest.drivers.blk import Disk
from vfiouser_virtio.testing.carriers import Carrier, carry
from vfiouser_virtio.virtio.options import Size

# One takes milliseconds, so there can be three times the usual rounds.
ROUNDS = 3
LIMITS_MS: dict[Carrier, float] = {"loopback": 5.0, "socket": 50.0, "socket-private": 50.0}


def run(options: Options) -> list[Row]:
    """The carriers in turn, so that what else the machine does falls on all of them."""
    for carrier in LIMITS_MS:
        _once(carrier)  # imports, and warms up
    figures = in_turn({carrier: partial(_once, carrier) for carrier in LIMITS_MS}, ROUNDS * options.rounds)
    return [
        Row(metric=carrier, unit="ms", ours=figures[carrier], targets={"": at_most(limit)})
        for carrier, limit in LIMITS_MS.items()
    ]


def _once(carrier: Carrier) -> float:
    return trio.run(_first_request, carrier)


async def _first_request(carrier: Carrier) -> float:
    begin = time.perf_counter()
    async with carry(Blk(size=Size(1 << 20)), carrier) as device:
        disk = device.driver_data
        assert isinstance(disk, Disk)
        data = await disk.read(0, 1)
        took = (time.perf_counter() - begin) * 1000
    assert len(data) == 512
    return took


BENCHMARK = Benchmark(
    name="first-request", summary="connect, negotiate, bind a driver and read a block, without a VM", run=run
)
