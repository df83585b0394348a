"""Process that runs many cases in one guest (`evil_matrix.many`), started again when it ends."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from evil_matrix import results
from evil_matrix.cases import EvilCase
from evil_matrix.results import CaseResult

_FOLDER = Path(__file__).parents[2]
# Beyond what the guest's exercise may take: to fetch, boot, ask what hangs, end.
_MORE_S = 400
_END_S = 20


class GuestProcess:
    """Process for cases on one kernel, each of whose exercises may take so many seconds."""

    def __init__(self, suite: str, seconds: float) -> None:
        self._suite = suite
        self._seconds = seconds
        self._process: trio.Process | None = None
        self._said = b""
        self.behind: tuple[str, ...] = ()
        """Cases that the guest of the last one has had before it."""

    async def run(self, case: EvilCase) -> CaseResult | str:
        """The result of a case; a text where it could not be run."""
        with trio.move_on_after(self._seconds + _MORE_S):
            line = await self._ask(case)
            if line is None:
                return await self._ended()
            answer = json.loads(line)
            self.behind = tuple(answer.pop("behind"))
            return str(answer["error"]) if "error" in answer else results.parse(json.dumps(answer))
        await self.end()
        return f"it has not ended after {self._seconds + _MORE_S:g} s"

    async def _ask(self, case: EvilCase) -> bytes | None:
        if self._process is None:
            self._process = await self._started()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            await process.stdin.send_all(f"{case.id}\n".encode())
        except trio.BrokenResourceError:
            return None
        while b"\n" not in self._said:
            more = await process.stdout.receive_some()
            if not more:
                return None
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    async def _started(self) -> trio.Process:
        path = os.pathsep.join([str(_FOLDER), str(_FOLDER / "scripts")])
        return await trio.lowlevel.open_process(
            [sys.executable, "-m", "evil_matrix.many", self._suite, str(self._seconds)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def _ended(self) -> str:
        assert self._process is not None
        status = await self._process.wait()
        await self.end()
        return f"the guest's process has ended with status {status}"

    async def end(self) -> None:
        """End it, and its guest; the next `run` starts another."""
        process, self._process, self._said, self.behind = self._process, None, b"", ()
        if process is not None:
            assert process.stdin is not None
            with trio.CancelScope(shield=True):
                await process.stdin.aclose()  # without more cases it ends, unless it is still at one
                for _ in range(2):
                    with trio.move_on_after(_END_S):
                        await process.wait()
                        break
                    process.terminate()
                process.kill()
                await process.wait()


@asynccontextmanager
async def guest_process(suite: str, seconds: float) -> AsyncIterator[GuestProcess]:
    """Such a process, which is ended with the block."""
    process = GuestProcess(suite, seconds)
    try:
        yield process
    finally:
        await process.end()
