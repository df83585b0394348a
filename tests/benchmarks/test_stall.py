"""The slow disk of `scripts/bench stall`, without the clock: accesses are answered while every request is pending."""

from benchmarks.server import served

from vfiouser_virtio.testing.raw.blocking import BlockingClient


def test_registers_answer_while_a_slow_disk_has_requests_pending() -> None:
    with served("blk,size=16M,delay=3600s") as (path,), BlockingClient(path) as client:
        client.start()
        client.read_sectors(80)
        for _ in range(200):
            assert client.status() == 15
        assert client.used == 0
