"""SIGTERM where a request of the host's storage never ends: the process ends all the same."""

import subprocess
import sys

_PROGRAM = """
import os, signal, trio
from functools import partial
from vfiouser_virtio.serving.signals import run_until_signal

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.CancelScope(shield=True):  # as IoUring.serve waits for what the kernel has
        await trio.sleep_forever()

trio.run(partial(run_until_signal, work, [lambda: print("let go", flush=True)], give_up_after=0.2))
"""


def test_a_request_that_never_ends_keeps_nobody_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + 15
    assert done.stdout == "let go\n"
    assert "SIGTERM: ended without waiting for a request that the host does not end" in done.stderr
    assert len(done.stderr.splitlines()) == 1


_SLOW = """
import os, signal, trio
from functools import partial
from vfiouser_virtio.serving.signals import run_until_signal

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.CancelScope(shield=True):
        for _ in range(40):
            await trio.sleep(0.02)
    print("done", flush=True)

trio.run(partial(run_until_signal, work, [lambda: print("let go", flush=True)], give_up_after=0.1))
"""


def test_what_still_goes_on_is_not_given_up() -> None:
    done = subprocess.run([sys.executable, "-c", _SLOW], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
