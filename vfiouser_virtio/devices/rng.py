"""Entropy device (virtio 1.4, 5.4): random bytes of the host, or of a file."""

import errno
import logging
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.protocols.virtio.rng import DEVICE_ID
from vfiouser_virtio.virtio import ConfigError, Device, DeviceError, queue, register
from vfiouser_virtio.virtio.options import Size

# A guest that offers gigabytes of buffers would have us allocate as much (Firecracker had to add the same cap).
MAX_BYTES_PER_CHAIN = 64 << 10


@register
class Rng(Device):
    """Entropy device: puts random bytes into every buffer: at least one (5.4.6.2), mostly as many as fit."""

    device_id = DEVICE_ID
    made_in_thread = True
    requestq = queue(max_size=64)

    def __init__(
        self,
        *,
        source: Annotated[Path | None, "file or device to read, a file over and over; default: getrandom(2)"] = None,
        max_bytes: Annotated[
            Size | None, "give the guest this much in each period, on average; default: no limit"
        ] = None,
        period: Annotated[int, "length of a period in milliseconds, for max-bytes"] = 1000,
    ) -> None:
        super().__init__()
        if (max_bytes is not None and max_bytes < 1) or period < 1:
            raise ConfigError(f"rng: max_bytes={max_bytes} in period={period} ms: both must be 1 or more")
        self.max_bytes, self.period = max_bytes, period / 1000
        # These two survive a reset, or a guest would get more by resetting.
        self._left, self._refill_at = 0, 0.0
        # A read that hangs is left behind at a reset. One at a time: each reset would take another of trio's threads,
        # which all devices of the process share.
        self._reading = trio.CapacityLimiter(1)
        try:
            self._source = source and _open(source)
        except OSError as error:
            raise DeviceError(f"rng: cannot open source {source}: {error.strerror}") from None

    def can_resume(self) -> bool:
        return True

    async def run(self) -> None:
        async for burst in self.requestq.bursts():
            for chain in burst:
                if wanted := min(chain.writable.length, MAX_BYTES_PER_CHAIN):
                    await self._wait_turn(wanted)
                    data = await self._random(wanted)
                    chain.writable.write(data)
                chain.complete()

    async def _wait_turn(self, count: int) -> None:
        """Keep to the limit by waiting; what one request takes too much, the next periods lack.

        Never by giving less than fits: Debian's Linux 6.12.107 then hangs in virtio_read, also with QEMU's own
        virtio-rng-pci,max-bytes=1000,period=1000.
        """
        while self.max_bytes is not None:
            if trio.current_time() >= self._refill_at:
                self._left = min(self._left, 0) + self.max_bytes
                self._refill_at = trio.current_time() + self.period
            if self._left > 0:
                self._left -= count
                return
            await trio.sleep_until(self._refill_at)

    async def _random(self, count: int) -> bytes:
        data = b""
        try:
            while self._source and len(data) < count:
                # In a thread, because /dev/hwrng blocks. A reset may leave it behind: its bytes are its own.
                piece = await trio.to_thread.run_sync(
                    _read_over_and_over, self._source, count - len(data), abandon_on_cancel=True, limiter=self._reading
                )
                if not piece:
                    break
                data += piece
        except OSError as error:
            message = "reading %s: %s; using getrandom(2) instead"
            self.log.once(error.errno, message, self._source, error.strerror, level=logging.ERROR)
        return data + os.urandom(count - len(data))

    def close(self) -> None:
        if self._source:
            close_fd(self._source.fileno())
            self._source.close()


def _read_over_and_over(source: FileIO, count: int) -> bytes:
    return source.read(count) or (source.read(count) if source.seek(0) == 0 else b"")


def _open(source: Path) -> FileIO:
    # NONBLOCK: a FIFO must be refused, not waited for.
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    file = FileIO(fd, "rb", closefd=False) if not stat.S_ISDIR(os.fstat(fd).st_mode) else None
    if file is None:
        close_fd(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    status = os.fstat(fd)
    problem = ""
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        problem = "is neither a file nor a device"
    elif stat.S_ISREG(status.st_mode) and not status.st_size:
        problem = "is empty"
    if problem:
        close_fd(fd)
        raise DeviceError(f"rng: source {source} {problem}")
    os.set_blocking(fd, True)
    return file
