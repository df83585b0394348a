"""Many cases, some at a time, each in a process of its own: what one device does to its server is no other's matter."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from evil_matrix import results, table
from evil_matrix.cases import EvilCase
from evil_matrix.results import CaseResult

_FOLDER = Path(__file__).parents[2]
# Beyond what the guest's exercise may take: to fetch, boot, ask what hangs, end.
_MORE_S = 400
_END_S = 20


async def run_all(
    todo: Sequence[tuple[EvilCase, str]], *, jobs: int, seconds: float, path: Path, verbose: bool = False
) -> int:
    """Run these cases and keep their results; 1 where one could not be run, or its fault did not happen."""
    waiting, left = iter(todo), len(todo)
    failed: list[str] = []

    async def work() -> None:
        for case, suite in waiting:
            await run(case, suite)

    async def run(case: EvilCase, suite: str) -> None:
        nonlocal left
        found = await run_one(case, suite, seconds)
        left -= 1
        if isinstance(found, str):
            failed.append(f"{case.id}, {suite}: {found}")
            print(f"{left:4} left  {suite}  {case.id}: could not be run: {found}", file=sys.stderr)
            return
        results.append(found, path)
        print(f"{left:4} left  {suite}  {table.line(found)}", file=sys.stderr)
        if case.faults and not found.happened and not case.never:
            failed.append(f"{case.id}, {suite}: the fault did not happen")
        if verbose or (case.faults and not found.happened):
            for said in found.said:
                print(f"             {said}", file=sys.stderr)

    async with trio.open_nursery() as nursery:
        for _ in range(jobs):
            nursery.start_soon(work)
    if failed:
        print("scripts/evil-matrix:", *failed, sep="\n  ", file=sys.stderr)
    return int(bool(failed))


async def _end(process: trio.Process) -> None:
    """Give it the time to end its QEMU, which may not end when it is told to."""
    process.terminate()
    with trio.move_on_after(_END_S, shield=True):
        await process.wait()
    process.kill()


async def run_one(case: EvilCase, suite: str, seconds: float) -> CaseResult | str:
    """The result of a case; a text where it could not be run."""
    command = [sys.executable, "-m", "evil_matrix.one", suite, str(seconds), case.id]
    path = os.pathsep.join([str(_FOLDER), str(_FOLDER / "scripts")])
    with trio.move_on_after(seconds + _MORE_S):
        ended = await trio.run_process(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_stdout=True,
            capture_stderr=True,
            stdin=subprocess.DEVNULL,
            check=False,
            deliver_cancel=_end,
        )
        if ended.returncode:
            return (ended.stderr.decode(errors="replace").strip() or f"exit status {ended.returncode}")[-2000:]
        return results.parse(ended.stdout.decode())
    return f"it has not ended after {seconds + _MORE_S:g} s"
