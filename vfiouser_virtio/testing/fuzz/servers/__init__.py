"""Fuzzing of any vfio-user server through its socket alone.

::

    seed, index ─▶ grammar: a good conversation ─▶ mutations ─▶ Case ─▶ player ─▶ connection ─▶ socket ─▶ the server
                                                                          │                                  │
             corpus/*.json ◀─ minimizing ◀─ confirmed on a new server ◀─ judge ◀── its end, its last words ──┘

What is a finding is in `judge`. The server is known by what it shows (`shown`) and by nothing else; it is started
again by a command of the user's (`server`), or found on its socket.
"""

from vfiouser_virtio.testing.fuzz.servers.run import WAIT, ServerRun, check_jobs, fuzz_server, replay_on_server
from vfiouser_virtio.testing.fuzz.servers.server import ServerGoneError

__all__ = ["WAIT", "ServerGoneError", "ServerRun", "check_jobs", "fuzz_server", "replay_on_server"]
