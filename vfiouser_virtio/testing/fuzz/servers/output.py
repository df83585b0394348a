"""Output of a server under test: its newest lines, and what sanitizers, assertions and run-times say in it."""

import os
import re
import select
import threading

_KEPT = 64 << 10
"""Bytes: a server may print as much as it likes."""
_MOST_READS = 64

# What names a fault better than a signal does, by the one who says it; the group is the place.
_TELLTALE = (
    re.compile(rb"SUMMARY: (\w+Sanitizer: [^\n]*)"),
    re.compile(rb"([^\s:]+:\d+:(?:\d+:)? runtime error: [^\n]*)"),  # UBSan, which goes on
    re.compile(rb"([^\s:]+:\d+: [^\n]*Assertion [^\n]* failed)"),  # assert(3)
    re.compile(rb"(panicked at [^\n]*)"),  # Rust
    re.compile(rb"^(panic: [^\n]*)", re.MULTILINE),  # Go
    re.compile(rb"Traceback \(most recent call last\):\n(?:[ |+][^\n]*\n)*([^\n]+)"),  # Python
    re.compile(rb"(\*\*\* [^\n]* detected \*\*\*)"),  # glibc's stack protector
    re.compile(rb"((?:malloc|free|realloc|double free|corrupted)[^\n]*(?:invalid|corrupt)[^\n]*)"),
)
_CHANGING = re.compile(r"0x[0-9a-fA-F]+|==\d+==|\bpid \d+|\(\S*/|\b[0-9a-f]{8,}\b")


class ServerOutput:
    """Reader of a pipe to which a server writes. A thread: what is printed must never make the server wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tail = b""
        self._unseen = b""
        self._ended = False
        self._read, self.write_fd = os.pipe()
        os.set_blocking(self._read, False)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to read; our copy of the writing end is closed, so that the pipe ends with the server."""
        os.close(self.write_fd)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._take():
                select.select([self._read], [], [])
        finally:
            with self._lock:
                self._ended = True
                os.close(self._read)

    def _take(self) -> bool:
        """Read what there is now, of which a flood is only a part; False at the end."""
        with self._lock:
            for _ in range(_MOST_READS):
                if self._ended:
                    return False
                try:
                    data = os.read(self._read, 1 << 16)
                except BlockingIOError:
                    return True
                if not data:
                    return False
                self._tail = (self._tail + data)[-_KEPT:]
                self._unseen = (self._unseen + data)[-_KEPT:]
        return True

    def all_of_it(self, seconds: float) -> str:
        """The newest of what was printed, after the server has ended; a child of its own may keep the pipe open."""
        self._thread.join(seconds)
        with self._lock:
            return self._tail.decode(errors="replace")

    def complaint(self) -> str:
        """What a sanitizer or a run-time has said since the last look, in one line; empty if nothing."""
        self._take()  # what was printed before the last reply is in the pipe, whether the thread has run or not
        with self._lock:
            text, self._unseen = self._unseen, b""
        return telltale(text)


def telltale(text: bytes) -> str:
    """The line of ``text`` that names a fault, without what differs from run to run; empty if there is none."""
    for pattern in _TELLTALE:
        if match := pattern.search(text):
            return _CHANGING.sub("", match[1].decode(errors="replace")).strip()[:200]
    return ""


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")
