"""Referee of a game: starts its two processes, watches them, and reports."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vfiouser_virtio.parent_death import end_with_parent
from vfiouser_virtio.testing.stress.device import work
from vfiouser_virtio.testing.stress.driver import drive
from vfiouser_virtio.testing.stress.game import Failure, Game, GameResult, Score, Table
from vfiouser_virtio.testing.stress.sabotage import SABOTAGE

# Both asleep, with no wake-up on its way, for so long (in seconds): between reading an eventfd and saying that it is
# awake a process is not stopped for as long as this, even on a busy machine.
TIMEOUT = 1.5
# Not asleep, but no buffer has moved: an endless loop, or a machine that stands still.
LONG_TIMEOUT = 60.0
_LOOK_EVERY = 0.02


def play(game: Game, progress: Callable[[int], None] | None = None) -> GameResult:
    """Play a game to its end; ``progress`` hears how many buffers have come back, some times a second.

    Raises Failure with what both sides know, when a buffer or a wake-up is lost.
    """
    table = Table(game)
    begin = time.perf_counter()
    children: dict[int, str] = {}
    try:
        cpus = sorted(os.sched_getaffinity(0))
        children[_start(table, "device", _device_side(game), cpus[-1])] = "device"
        children[_start(table, "driver", drive, cpus[0])] = "driver"
        _watch(table, children, progress)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        board = list(table.board[: len(Score)])
        table.close()
    seconds = time.perf_counter() - begin
    return GameResult(board[Score.DONE], seconds, board[Score.DRIVER_SLEEPS], board[Score.DEVICE_SLEEPS])


def _device_side(game: Game) -> Callable[[Table], None]:
    if game.through_queue:
        from vfiouser_virtio.testing.stress.queue import work_in_queue

        return work_in_queue
    return work


def _start(table: Table, side: str, play_side: Callable[[Table], None], cpu: int) -> int:
    """Fork one player."""
    sys.stdout.flush()
    sys.stderr.flush()
    referee = os.getpid()
    return os.fork() or _be(table, side, play_side, cpu, referee)


def _be(table: Table, side: str, play_side: Callable[[Table], None], cpu: int, referee: int) -> NoReturn:
    """The whole life of a player, on its own CPU; without what the referee's process would do at its end."""
    status = 1
    try:
        # A killed referee, by a timeout say, must not leave two processes behind that wait for each other.
        end_with_parent(referee)
        os.sched_setaffinity(0, {cpu})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the referee
        signal.signal(signal.SIGUSR1, lambda *_: _tell(table, side))
        where, sabotage = SABOTAGE.get(table.game.sabotage, ("", None))
        if sabotage is not None and where in (side, "both"):
            sabotage()
        play_side(table)
        if side == "driver":
            table.board[Score.OVER] = 1
            os.eventfd_write(table.kick, 1)
        status = 0
    except Failure as failure:
        _tell(table, side)
        print(f"{side}: {failure}", file=sys.stderr)
    except BaseException:
        _tell(table, side)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _watch(table: Table, children: dict[int, str], progress: Callable[[int], None] | None) -> None:
    board = table.board
    seen, since = list(board[: len(Score)]), time.perf_counter()
    while children:
        time.sleep(_LOOK_EVERY)
        for pid, side in list(children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del children[pid]
                if status:
                    raise Failure(f"{table.game}: the {side} has given up")
        now, new = time.perf_counter(), list(board[: len(Score)])
        if new != seen:
            seen, since = new, now
            if progress is not None:
                progress(board[Score.DONE])
        elif children and now - since > (TIMEOUT if _all_asleep(table, children) else LONG_TIMEOUT):
            for pid in children:
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.2)
            raise Failure(f"{table.game}: after {board[Score.DONE]} buffers {' and '.join(children.values())} sleep on")


def _all_asleep(table: Table, children: dict[int, str]) -> bool:
    asleep = {"driver": Score.DRIVER_ASLEEP, "device": Score.DEVICE_ASLEEP}
    return all(table.board[asleep[side]] for side in children.values()) and not any(
        _count(fd) for fd in (table.kick, table.call)
    )


def _count(fd: int) -> int:
    """What an eventfd holds, without reading it."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "eventfd-count":
            return int(value, 16)
    raise RuntimeError(f"/proc/self/fdinfo/{fd} says nothing of an eventfd")


def _tell(table: Table, side: str) -> None:
    """Print what this process knows, and the ring as it sees it."""
    thing: Any = table.vq if side == "driver" else table.device_side
    numbers = {name: value for name, value in vars(thing).items() if isinstance(value, int | str)}
    lines = [f"{side}: {numbers}"]
    if side == "driver":
        parts = table.vq.desc, table.vq.driver, table.vq.device
        lines += [f"  {part:#x}: {bytes(table.memory.at(part, 64)).hex(' ', 4)}" for part in parts]
    lines.append(f"  {', '.join(f'{score.name} {table.board[score]}' for score in Score)}")
    print("\n".join(lines), file=sys.stderr, flush=True)
