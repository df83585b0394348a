"""passt, fetched from Debian, and a network that it can give to a guest."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.net_namespace import NetNamespace, net_namespace

from vfiouser_virtio.vm import debian, programs

HOST, ROUTER = "192.0.2.7", "192.0.2.1"


def passt_script(folder: Path) -> Path:
    """A script in ``folder`` that runs the fetched program with its own libraries."""
    argv = programs.argv(debian.fetch("passt", ["passt"], megabytes=3), "passt")
    script = folder / "passt"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n')
    script.chmod(0o755)
    return script


@contextmanager
def passt_namespace() -> Iterator[NetNamespace]:
    """A network namespace with the address `HOST` and the route over `ROUTER`, which passt gives to the guest."""
    with net_namespace() as made:
        for command in ("tuntap add up0 mode tap", f"addr add {HOST}/24 dev up0", "link set up0 up"):
            made.ip(command)
        made.ip(f"route add default via {ROUTER} dev up0")
        yield made
