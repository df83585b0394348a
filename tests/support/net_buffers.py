"""Receive buffers of a network device's driver, and what came into them."""

from vfiouser_virtio.testing.driver import Driver

RX = 0


def add(driver: Driver, *sizes: int) -> list[int]:
    """Receive buffers of these sizes; their tokens."""
    tokens = [driver.add(RX, [], [size]) for size in sizes]
    driver.kick(RX)
    return tokens


async def received(driver: Driver, *tokens: int) -> list[bytes]:
    """What was written to these buffers, once it is."""
    used = [await driver.wait(RX, token) for token in tokens]
    return [each.data[0][: each.written] for each in used]
