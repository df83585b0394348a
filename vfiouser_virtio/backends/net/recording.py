"""Recording of a netdev's frames in a capture file (pcapng) that Wireshark opens."""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import FrameSink, Netdev
from vfiouser_virtio.backends.net.netfilter import NetFilter
from vfiouser_virtio.backends.net.pcap_file import packet, section
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.device_log import DeviceLog, id_in_making
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.output_file import open_output, write_all
from vfiouser_virtio.protocols.pcap import PacketDirection

logger = logging.getLogger(__name__)

QUEUE_BYTES = 16 << 20
"""What waits for a slow disk; frames that come then are missing in the file, which says how many and where."""
MIN_MAXLEN, MAX_MAXLEN = 14, 262_144
# Seconds that its thread may take to end.
_END_TIMEOUT = 0.5


class RecordedNetdev(NetFilter):
    """`Netdev` before another one, which writes every frame that passes to a file, from both directions.

    Frames are recorded as they pass: with checksums and segmentation still to be done, where offloads leave them so.
    The file is made anew, with mode 0600, or is a FIFO that is read (``wireshark -k -i FIFO``). A regular file grows to
    ``dump_limit`` MiB and no further, which is said once.
    Raises ConfigError for a number out of its range, DeviceError for a file that cannot be written.
    """

    def __init__(
        self,
        netdev: Netdev,
        *,
        dump: Annotated[Path, "record all frames in this file, in pcapng, which Wireshark opens"],
        dump_maxlen: Annotated[int, "bytes of each frame that are recorded"] = MAX_MAXLEN,
        dump_limit: Annotated[int, "MiB that the recording may have; what passes then is not in it"] = 256,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if not MIN_MAXLEN <= dump_maxlen <= MAX_MAXLEN:
            raise ConfigError(f"dump-maxlen={dump_maxlen}: expected {MIN_MAXLEN} to {MAX_MAXLEN}")
        if dump_limit < 1:
            raise ConfigError(f"dump-limit={dump_limit}: expected 1 or more MiB")
        super().__init__(netdev)
        self._maxlen = dump_maxlen
        self._clock = clock
        try:
            self.writer = _Writer(dump, dump_limit << 20)
            """What writes the file."""
        except OSError as error:
            raise DeviceError(f"dump={dump}: {error.strerror}") from None
        self.writer.put(section("vfiouser-virtio", netdev.describe(), dump_maxlen))
        self._lost = 0

    def put(self, frame: Frame) -> bool:
        if not self.netdev.put(frame):
            return False
        self.record(frame, PacketDirection.OUTBOUND)
        return True

    def put_in(self, frame: Frame, device: FrameSink) -> bool:
        if not device.put(frame):
            return False
        self.record(frame, PacketDirection.INBOUND)
        return True

    def record(self, frame: Frame, direction: PacketDirection) -> None:
        """Note that a frame has passed, as seen from the guest."""
        data = frame.tobytes() if frame.length <= self._maxlen else frame.head(self._maxlen)
        if self.writer.put(packet(data, frame.length, self._clock(), direction, self._lost)):
            self._lost = 0
        else:
            self._lost += 1

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: no thread of ours keeps rights that the process gives up."""
        self.writer.rest()
        return super().confine()

    def close(self) -> None:
        """What has passed is in the file then, unless that takes more than half a second."""
        super().close()
        self.writer.close()


class _Writer:
    """File with a thread that writes to it: neither a slow disk nor a FIFO's reader holds anything up."""

    def __init__(self, path: Path, limit: int) -> None:
        self._fd = open_output(path)
        regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._path = path
        self._log = DeviceLog(logger, id_in_making() or "netdev")
        self._left = limit if regular else None  # bytes that the file may still get; -1 when that was said
        self._pending: list[bytes] = []
        self.waiting = 0
        """Bytes that are not written yet."""
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._ended = self._resting = False
        self._start()

    def _start(self) -> None:
        self.thread = threading.Thread(target=self._write, name="dump", daemon=True)
        self.thread.start()

    def rest(self) -> None:
        """End the thread; what is put next starts another. Raises DeviceError where the file's reader holds it up."""
        self._resting = True
        self._work.set()
        self.thread.join(_END_TIMEOUT)
        if self.thread.is_alive():
            raise DeviceError(f"dump={self._path}: what was written to it is not taken")

    def put(self, data: bytes) -> bool:
        """Whether there was room for it, now and in the file."""
        if self._left is not None and self._left < len(data):
            if self._left >= 0:
                self._left = -1
                self._log.error("dump=%s has its full size; what passes from now on is not in it", self._path)
            return False
        with self._lock:
            if self._ended or self.waiting + len(data) > QUEUE_BYTES:
                return False
            self._pending.append(data)
            self.waiting += len(data)
        if self._resting:
            self._resting = False
            self._start()
        if not self._work.is_set():  # a system call, and the thread wakes
            self._work.set()
        if self._left is not None:
            self._left -= len(data)
        return True

    def _write(self) -> None:
        ended = False
        while not ended and not (self._resting and not self._pending):
            self._work.wait()
            self._work.clear()
            with self._lock:
                pending, self._pending = self._pending, []
                ended = self._ended
            data = b"".join(pending)
            try:
                write_all(self._fd, data)
            except OSError as error:
                self._log.error("dump=%s: %s; what passes from now on is not in it", self._path, error.strerror)
                with self._lock:
                    self._ended = ended = True
            with self._lock:
                self.waiting -= len(data)  # what is being written is memory of ours as well
        if ended:
            os.close(self._fd)

    def close(self) -> None:
        with self._lock:
            failed, self._ended = self._ended, True
        if self._resting and not failed:
            self._resting = False
            self._start()
        self._work.set()
        briefly(self.thread.join)
