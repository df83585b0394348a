"""The limit of file descriptors that ``serve`` gives itself, and its processes."""

import resource
from pathlib import Path

import pytest
from support.command import COMMAND, serve_process
from support.processes import children

SOFT, HARD = 128, 3000


@pytest.mark.parametrize("words", [(), ("--supervise",)], ids=["plain", "supervised"])
async def test_the_soft_limit_is_the_hard_one(words: tuple[str, ...], tmp_path: Path) -> None:
    limited = ["sh", "-c", f'ulimit -Sn {SOFT} && ulimit -Hn {HARD} && exec "$@"', "sh", *COMMAND]
    async with serve_process(*words, "--device", "rng", folder=tmp_path, command=limited) as served:
        for process in (served.process.pid, *children(served.process.pid)):
            assert resource.prlimit(process, resource.RLIMIT_NOFILE) == (HARD, HARD)
