"""Clients that come after an attack, or during it: they must be served, and reach nothing of those before them."""

import time

from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.testing.fuzz.process.neighbour import NO_ANSWER
from vfiouser_virtio.testing.raw.blocking import DATA, BlockingClient
from vfiouser_virtio.testing.raw.long_chains import FAR, NEAR, PAGE
from vfiouser_virtio.testing.raw.ring import WRITE

_ROOM = 64
_RETRY = 0.05
_GIVES = "rng"


def visit(path: str, device: str, *, patience: float) -> str | None:
    """What is wrong with how a new client is served; it comes again for ``patience`` seconds while it is refused.

    ``device`` is the value of ``--device``: of an entropy device it wants bytes, also where it has mapped nothing.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with BlockingClient(path, timeout=NO_ANSWER) as client:
                return _served(client) if device.split(",")[0] == _GIVES else _started(client)
        except TimeoutError:
            return "a new client is not answered"
        except OSError as error:
            # The one before may still be leaving, or a process be on its way.
            if time.monotonic() > end:
                return f"a new client is refused: {error}"
        time.sleep(_RETRY)


def _started(client: BlockingClient) -> str | None:
    client.start()
    status = DeviceStatus(client.status())
    return f"a new client's device has status {status!r}" if DeviceStatus.NEEDS_RESET in status else None


def _served(client: BlockingClient) -> str | None:
    for address in (NEAR, NEAR + 2 * PAGE, FAR, DATA + client.ram.size):
        _start(client)
        _offer(client, address)
        _wait(client, seconds=0.5)  # for nothing: it may be answered by an error, or not at all
    pages = [(base + PAGE * number, number * PAGE) for base in (NEAR, FAR) for number in range(4)]
    for address, offset in pages:
        client.map(address, DATA + offset, PAGE)
    for address, offset in [(DATA, 0), *pages]:
        _start(client)
        client.ram.write(DATA + offset, bytes(_ROOM))
        _offer(client, address)
        if not _wait(client, seconds=NO_ANSWER):
            return f"a new client's request at {address:#x} is not answered; status {client.status():#x}"
        if client.ram.read(DATA + offset, _ROOM) == bytes(_ROOM):
            return f"a new client's request at {address:#x} was answered, and its memory not written"
    return None


def _start(client: BlockingClient) -> None:
    """Bring the device up, with rings in which there is nothing yet."""
    client.set("device_status", 0)
    client.ram.write(0, bytes(DATA))
    client.start()


def _offer(client: BlockingClient, address: int) -> None:
    client.ring.describe(0, (address, _ROOM, WRITE, 0))
    client.ring.offer(0)
    client.kick()


def _wait(client: BlockingClient, seconds: float) -> bool:
    """Whether the request has come back; False at once where the device needs a reset."""
    end = time.monotonic() + seconds
    while client.ring.used_idx == 0:
        if client.status() & DeviceStatus.NEEDS_RESET or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
