"""``scripts/stress``: games of both kinds, of random sizes and features, until enough was done."""

import argparse
import random
import sys
import time
from dataclasses import replace

from vfiouser_virtio.testing.stress.game import Failure, Game, GameResult
from vfiouser_virtio.testing.stress.referee import play
from vfiouser_virtio.testing.stress.sabotage import SABOTAGE

EXAMPLES = """
examples:
  scripts/stress                                 both kinds of ring, 10 s each
  scripts/stress --operations 20000000           the long run: 20 million buffers through each kind
  scripts/stress --ring packed --size 7          one kind, one size
  scripts/stress --through-queue                 the device side is a whole queue, in trio
  scripts/stress --sabotage device-look          break something: must end with status 1

Exit status: 0 nothing was lost, 1 a buffer or a wake-up was, 2 wrong usage.
"""

# Buffers of one game for each entry of the queue: so that each size takes about as long, some seconds.
GAME = 800


def main() -> int:
    """Parse, play, report; the exit status."""
    options = _parse()
    kinds = {"split": [False], "packed": [True], "both": [False, True]}[options.ring]
    try:
        for packed in kinds:
            _play_kind(packed, options)
    except Failure as failure:
        print(f"\nLOST: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _play_kind(packed: bool, options: argparse.Namespace) -> None:
    """Games of one kind until enough was done; prints what they have come to."""
    rng = random.Random(options.seed)
    kind = "packed" if packed else "split"
    progress = _Progress(kind)
    begin = progress.begin
    total = GameResult(0, 0.0, 0, 0)
    interrupted = False
    while not interrupted:
        left = options.seconds - (time.perf_counter() - begin)
        missing = options.operations - total.operations
        if left <= 0 or missing <= 0:
            break
        size = options.size or _size(packed, rng)
        game = Game(
            packed=packed,
            size=size,
            event_idx=rng.random() < 0.9 and not options.no_event_idx,
            indirect=rng.random() < 0.5,
            in_order=rng.random() < 0.2,
            operations=min(GAME * max(size, 8), missing),
            seconds=left,
            seed=rng.randrange(1 << 32),
            through_queue=options.through_queue,
            sabotage=options.sabotage,
        )
        progress.before, progress.done = total.operations, 0
        try:
            result = play(game, progress)
        except KeyboardInterrupt:
            interrupted, result = True, GameResult(progress.done, 0.0, 0, 0)
        total = replace(
            total,
            operations=total.operations + result.operations,
            driver_sleeps=total.driver_sleeps + result.driver_sleeps,
            device_sleeps=total.device_sleeps + result.device_sleeps,
        )
    seconds = time.perf_counter() - begin
    _clear_line()
    print(
        f"{kind}: {total.operations:,} buffers in {seconds:.1f} s ({total.operations / seconds:,.0f}/s), nothing lost; "
        f"the driver slept {total.driver_sleeps:,} times, the device {total.device_sleeps:,} times",
        flush=True,
    )
    if interrupted:
        raise KeyboardInterrupt


def _size(packed: bool, rng: random.Random) -> int:
    return rng.randint(1, rng.choice((8, 100, 300))) if packed else 1 << rng.randrange(9)


class _Progress:
    """One line on a terminal; elsewhere a new one each minute."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.begin = self.last = time.perf_counter()
        self.before = 0
        """Buffers of the games that are over."""
        self.done = 0
        """Of this one."""

    def __call__(self, done: int) -> None:
        self.done = done
        now = time.perf_counter()
        terminal = sys.stderr.isatty()
        if now - self.last > (0.2 if terminal else 60):
            self.last = now
            total, seconds = self.before + done, now - self.begin
            line = f"{self.kind}: {total:,} buffers, {seconds:.0f} s, {total / seconds:,.0f}/s"
            print(f"\r{line} " if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def _clear_line() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/stress",
        description="Guest and device in two processes on one memfd: is a buffer or a wake-up ever lost?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="time for each kind of ring (default 10)")
    parser.add_argument("--operations", type=int, metavar="N", help="buffers for each kind of ring, instead of a time")
    parser.add_argument("--ring", choices=["split", "packed", "both"], default="both")
    parser.add_argument("--size", type=int, metavar="N", help="entries of the queue (default: another one each game)")
    parser.add_argument("--no-event-idx", action="store_true", help="flags only (default: EVENT_IDX in 9 of 10 games)")
    parser.add_argument("--through-queue", action="store_true", help="the device side is virtio.Queue in trio")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="the same games again, as far as that goes")
    parser.add_argument(
        "--sabotage", choices=SABOTAGE, default="", metavar="NAME", help=f"one of {', '.join(SABOTAGE)}"
    )
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 1e9 if options.operations else 10.0
    if options.operations is None:
        options.operations = 1 << 62
    if options.seed is None:
        options.seed = random.randrange(1 << 32)
    if options.seconds <= 0 or options.operations <= 0 or (options.size is not None and options.size <= 0):
        parser.error("amounts must be greater than 0")
    if options.size and options.ring != "packed" and options.size & (options.size - 1):
        parser.error(f"a split ring of {options.size} entries: no power of two (or use --ring packed)")
    return options


if __name__ == "__main__":
    sys.exit(main())
