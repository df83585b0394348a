"""Dekker's litmus test of a barrier, in two processes: store mine, barrier, load yours. Somebody must see a store.

Run as a program, for it forks: ``python litmus.py full_barrier|lock_barrier|nothing`` prints how often nobody saw one.
"""

import mmap
import os
import sys
from array import array

from vfiouser_virtio import barrier

ROUNDS = 8_000
# Each word in a cache line of its own, used once: the store has to wait for the line, the load does not wait for it.
LINE = 64


def play(me: int, words: memoryview, turn: memoryview, seen: memoryview, fence: object) -> None:
    """One of the two sides."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-me]})
    mine, yours = 2 * me, 2 * (1 - me)
    assert callable(fence)
    for number in range(ROUNDS):
        store = LINE // 2 * (mine * ROUNDS // 2 + number)
        load = LINE // 2 * (yours * ROUNDS // 2 + number)
        # Start together, but not always at the same moment.
        turn[8 * me] = number + 1
        looks = 0
        while turn[8 * (1 - me)] <= number:
            looks += 1
            if looks % 500 == 0:
                os.sched_yield()  # to somebody else's process, on a busy machine
        for _ in range((number * (3 + me)) % 11):
            pass
        words[store] = 1
        fence()
        seen[me * ROUNDS + number] = words[load]


def main() -> None:
    """Two processes, and the result on standard output."""
    name = sys.argv[1]
    fence = getattr(barrier, name) if name != "nothing" else tuple
    words = memoryview(mmap.mmap(-1, 2 * ROUNDS * LINE)).cast("H")
    turn = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    seen = memoryview(mmap.mmap(-1, 4 * ROUNDS)).cast("H")
    child = os.fork()
    if not child:
        play(1, words, turn, seen, fence)
        os._exit(0)
    play(0, words, turn, seen, fence)
    os.waitpid(child, 0)
    results = array("H", seen[: 2 * ROUNDS])
    print(sum(not (results[number] or results[ROUNDS + number]) for number in range(ROUNDS)))


if __name__ == "__main__":
    main()
