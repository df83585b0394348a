"""``serve``: devices on sockets, for QEMUs that are started by other means.

On stdout there is one line per device, then QEMU's arguments for people, then the line that scripts wait for::

    device blk0 blk /run/user/1000/vfiouser-virtio-x1y2/blk0.sock
    ready 1

A device's line has its name, its type, and the rest of it is the socket (``fd:3`` where that has no path). With
``--json`` every line is an object: ``{"event": "device", …}``, ``{"event": "ready", "devices": 1}``.
"""

import argparse
import gc
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import (
    SubParsers,
    add_command,
    add_device_arguments,
    add_serving_arguments,
    add_socket_arguments,
    audit_of,
    server_of,
)
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.serving.device_specs import DeviceSpec, all_specs
from vfiouser_virtio.serving.terminal import flush, write_patiently

if TYPE_CHECKING:
    from vfiouser_virtio.cli.audit_report import AuditReport
    from vfiouser_virtio.serving.serve import Serving
    from vfiouser_virtio.serving.signals import EndVerdict

_EXAMPLES = """\
  vfiouser-virtio serve --device blk,path=disk.img --device rng --device console,chardev=pty
  vfiouser-virtio serve --device blk,path=disk.img,readonly,socket=/run/vm/blk0.sock
  vfiouser-virtio serve --device '{"driver": "blk", "path": "a,b.img"}' --socket /run/vm/blk0.sock
  vfiouser-virtio serve --config devices.toml          # [[device]] / driver = "blk" / path = "disk.img"
  vfiouser-virtio serve --device my_device.py:MyDevice,key=value
  vfiouser-virtio serve --engine libvfio-user --libvfio-user ./build/lib/libvfio-user.so --device blk,path=disk.img

stdout, in this order:
  device NAME TYPE SOCKET    one line for each; the socket is the rest of the line
  (QEMU's command line, for you to paste and complete)
  ready COUNT                the sockets can be connected to
With --json each line is a JSON object instead, with an "event" of "device" or "ready".
"""


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "serve",
        summary="serve devices on sockets",
        description="Serve devices, each on a UNIX socket, to one QEMU after another, until SIGINT or SIGTERM.",
        usage="--device DEVICE[,KEY=VALUE,…] … [options]",
        examples=_EXAMPLES,
    )
    add_device_arguments(parser)
    add_socket_arguments(parser)
    add_serving_arguments(parser, log_level="info")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Serve; 0 when a signal, or with ``--once`` the last client's leaving, has ended it."""
    return serve_devices(all_specs(arguments.config, arguments.device), arguments)


def serve_devices(specs: Sequence[DeviceSpec], arguments: argparse.Namespace) -> int:
    """Serve these devices, as the arguments of `add_socket_arguments` and `add_serving_arguments` say."""
    _check_ready_fd(arguments.ready_fd)
    _raise_file_limit()

    gc.disable()  # what an import makes stays, so looking for garbage among it is 5 % of the start for nothing
    with audit_of(arguments) as audit:
        status = _serve_all(specs, arguments, audit)
    return status if audit is None else audit.status(status)


def _raise_file_limit() -> None:
    """As many file descriptors as the process may have.

    The soft limit, mostly 1024, is for programs that use select(2), which we do not. Each file and each eventfd of each
    client takes one.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the host's fs.nr_open has been made less meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve_all(specs: Sequence[DeviceSpec], arguments: argparse.Namespace, audit: "AuditReport | None") -> int:
    import trio

    from vfiouser_virtio.serving.signals import EndVerdict, run_until_signal

    abandoned: list[Callable[[], None]] = []
    server = server_of(
        arguments,
        abandoned,
        audit=audit,
        places=arguments.places or (),
        once=arguments.once,
        not_for_children=() if arguments.ready_fd is None else (arguments.ready_fd,),
    )
    making = server(*specs)
    gc.freeze()  # nor later, and what forked processes share with us stays shared
    gc.enable()
    verdict = EndVerdict()
    with making as made:
        trio.run(partial(run_until_signal, partial(_serve, arguments, made, verdict), abandoned, verdict=verdict))
    return 0


async def _serve(
    arguments: argparse.Namespace, serving: "AbstractAsyncContextManager[Serving]", verdict: "EndVerdict"
) -> int:
    from vfiouser_virtio.serving.service import ready_service
    from vfiouser_virtio.vfio_user import ServiceManager

    # Before the sandbox, in which no socket is made.
    with ServiceManager() as manager:
        async with serving as served:
            gc.freeze()  # devices and sockets stay, too: a full collection would go through them for 0.5 ms, 2 for four
            # From here on there may be clients, whose devices do not wait for a reader of stdout.
            text = "".join(f"{line}\n" for line in _announce(served, as_json=arguments.json))
            flush()  # what devices have printed comes first
            with suppress(BrokenPipeError):  # the reader is gone: no reason to stop serving
                await write_patiently(1, text.encode())
            async with ready_service(manager):
                if arguments.ready_fd is not None:
                    with suppress(BrokenPipeError):  # the reader is gone
                        await write_patiently(arguments.ready_fd, b"ready\n")
                    close_all([arguments.ready_fd])
                await served.finished.wait()
            verdict.give(0)
    return 0


def _announce(served: "Serving", *, as_json: bool) -> Iterator[str]:
    for endpoint in served.endpoints:
        if as_json:
            shown: dict[str, object] = {"event": "device", "name": endpoint.name, "driver": endpoint.driver}
            shown |= {"socket": endpoint.where, "host-side": endpoint.host_side, "qemu-device": endpoint.qemu_device}
            yield json.dumps(shown)
        else:
            yield f"device {endpoint.name} {endpoint.driver} {endpoint.where}"
    count = len(served.endpoints)
    if as_json:
        yield json.dumps({"event": "ready", "devices": count})
        return
    for endpoint in served.endpoints:
        if endpoint.host_side:
            yield f"# {endpoint.name} on the host: {endpoint.host_side}"
    if served.qemu_command:
        yield "# QEMU 10.1 or newer, your guest's own options to be added:"
        yield served.qemu_command
    yield f"ready {count}"


def _check_ready_fd(fd: int | None) -> None:
    try:
        if fd is not None:
            os.fstat(fd)
    except (OSError, OverflowError):
        raise ConfigError(f"--ready-fd {fd}: that file descriptor is not open") from None
