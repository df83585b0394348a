"""Attackers' processes, as the one that watches has them (`lane` is the other end)."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vfiouser_virtio.testing.fuzz.process.case import ProcessCase
from vfiouser_virtio.testing.fuzz.process.server import PATIENCE, TREE, ServerUnderAttack

_PROGRAM = "import sys; from vfiouser_virtio.testing.fuzz.process.lane import main; sys.exit(main(sys.argv[1:]))"


class AttackerProcess:
    """Process of one lane. A context manager, at whose end it is killed."""

    def __init__(self, case: ProcessCase, number: int, server: ServerUnderAttack, folder: Path) -> None:
        spec = {
            "lane": number,
            "sockets": server.sockets,
            "server": server.pid,
            "folder": str(folder),
            "seconds": case.seconds,
            "foreign": case.foreign,
            "steps": case.lanes[number],
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(spec)],
            env=os.environ | {"PYTHONPATH": str(TREE)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._events: list[dict[str, Any]] = []
        self._errors = ""
        self._heard = threading.Condition()
        self._readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "AttackerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):  # what it was told last, and has not heard
                stream.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, word: str) -> None:
        """What it is to do next; one that has been killed by its own attack does nothing any more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except OSError:
            pass

    def has_said(self, key: str) -> bool:
        """Whether it has, or never will."""
        return any(key in event for event in self._events) or self._process.poll() is not None

    def wait_said(self, key: str, seconds: float = PATIENCE) -> Any:
        """What it says with this key; None when it ends before, or says nothing."""
        end = time.monotonic() + seconds
        with self._heard:
            while True:
                for event in self._events:
                    if key in event:
                        return event[key]
                if self._process.poll() is not None or time.monotonic() > end:
                    return None
                self._heard.wait(0.1)

    @property
    def refusals(self) -> list[str]:
        """Steps that could not be carried out, and why."""
        return [f"{event['refused']}: {event['why']}" for event in self._events if "refused" in event]

    @property
    def mistake(self) -> str:
        """Traceback of one that has failed by itself: a mistake of the fuzzer's."""
        if self._process.poll() is not None:
            self._readers[1].join(PATIENCE)
        return self._errors if "Traceback" in self._errors else ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._heard:
                self._events.append(json.loads(line))
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors = self._process.stderr.read()
