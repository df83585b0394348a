"""``probe``: regions, interrupts, PCI function and virtio device of a vfio-user server."""

import argparse
import json
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_log_arguments
from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.serving.terminal import say

if TYPE_CHECKING:
    from vfiouser_virtio.testing.survey import Survey


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "probe",
        summary="show what a vfio-user server has behind its socket",
        description="Connect to any vfio-user server as its client, show the regions, the PCI function and the virtio\n"
        "device, and reset the device. No other client can be connected meanwhile.",
        usage="[--json | --lspci] SOCKET",
        examples="  vfiouser-virtio probe /run/x/blk0.sock\n"
        "  vfiouser-virtio probe --json /run/x/blk0.sock\n"
        "  vfiouser-virtio probe --lspci /run/x/blk0.sock | lspci -F /dev/stdin -vv\n",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--lspci", action="store_true", help="the config space, as `lspci -F FILE -vv` reads it")
    parser.add_argument("socket", metavar="SOCKET", help="where the server listens")
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="SECONDS", help="wait this long for a reply (default: 5)"
    )
    add_log_arguments(parser, log_level="warning")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Look, and print. Raises NoServerError when there is no vfio-user server, ConfigError when it makes no sense."""
    import trio

    from vfiouser_virtio.testing.survey_text import as_lspci, as_text
    from vfiouser_virtio.vfio_user import RemoteError

    try:
        found = trio.run(_survey, arguments.socket, arguments.timeout)
    except (PeerError, RemoteError) as error:
        raise ConfigError(f"{arguments.socket}: {str(error).removeprefix(f'{arguments.socket}: ')}") from error
    if arguments.json:
        say(json.dumps(found.as_dict(), indent=2))
    else:
        say((as_lspci(found) if arguments.lspci else as_text(found)).removesuffix("\n"))
    return 0


async def _survey(path: str, timeout: float) -> "Survey":
    from vfiouser_virtio.cli.no_server import explain, has_client
    from vfiouser_virtio.testing.survey import survey
    from vfiouser_virtio.vfio_user import ClientOptions, ConnectError, RemoteError, connect

    busy = has_client(path)
    agreed = False
    try:
        async with connect(path, options=ClientOptions(timeout=timeout)) as client:
            agreed = True
            return await survey(client)
    except (ConnectError, PeerError, RemoteError) as error:
        if agreed:
            raise
        raise await explain(path, error, busy=busy) from None
