"""``main`` of a device file: the file itself is a command that serves its device.

::

    if __name__ == "__main__":
        main(Pattern)
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vfiouser_virtio.cli import execute
from vfiouser_virtio.cli.arguments import add_serving_arguments, add_socket_arguments
from vfiouser_virtio.cli.exit_status import EXPLAINED, status_of
from vfiouser_virtio.cli.list_devices import as_text, common_help, summary
from vfiouser_virtio.cli.serve import serve_devices
from vfiouser_virtio.errors import AuthorError, ConfigError
from vfiouser_virtio.serving.device_files import is_device
from vfiouser_virtio.serving.device_specs import DeviceSpec, parse_options
from vfiouser_virtio.serving.options import class_options
from vfiouser_virtio.serving.terminal import complain, set_up_streams

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice

_EPILOG = """\
{file}, as KEY=VALUE words:
{own}
{common}

examples:
  python3 {file}                              # on a socket in a new private folder; QEMU's arguments are printed
  python3 {file} socket=/run/vm/{name}.sock --once
  python3 {file} --trace                      # every message between QEMU and the device, decoded, on stderr
  vfiouser-virtio run --device {file}:{class_name}    # the same device in a small Linux guest, at once

stdout, in this order:
  device NAME TYPE SOCKET    the socket is the rest of the line
  (QEMU's command line, for you to paste and complete)
  ready 1                    the socket can be connected to

{explained}"""


def main(device_class: "type[AnyDevice]", argv: Sequence[str] | None = None) -> NoReturn:
    """Serve a device of ``device_class`` as its options on the command line say, and end the process.

    The words of ``argv`` (by default the process's) are the device's options, ``KEY=VALUE`` as after ``--device``, and
    options of ``vfiouser-virtio serve``; ``--help`` shows them. Ends with the exit status of that command, by
    SystemExit. Raises AuthorError for what is no device class.
    """
    if not is_device(device_class):
        raise AuthorError(
            f"main({device_class!r}): expected a subclass of vfiouser_virtio.Device, or of PciDevice, "
            "and no object of it"
        )
    set_up_streams()
    file = Path(sys.argv[0]).name
    try:
        parser = _parser(device_class, file)
    except ConfigError as error:  # its annotations, which --help has to show
        complain(error, with_traceback=False)
        sys.exit(status_of(error))
    arguments = parser.parse_intermixed_args(argv)
    arguments.execute = partial(_execute, device_class, file)
    sys.exit(execute(arguments))


def _execute(device_class: "type[AnyDevice]", file: str, arguments: argparse.Namespace) -> int:
    spec = DeviceSpec(file, parse_options(arguments.options), device_class)
    return serve_devices([spec], arguments)


def _parser(device_class: "type[AnyDevice]", file: str) -> argparse.ArgumentParser:
    own = class_options(device_class).values()
    parser = argparse.ArgumentParser(
        prog=file,
        usage=f"python3 {file} [KEY=VALUE …] [options]",
        description=f"{summary(device_class)}: serve it on a UNIX socket, to one QEMU after another, until SIGINT or "
        "SIGTERM.",
        epilog=_EPILOG.format(
            file=file,
            name=device_class.name,
            class_name=device_class.__name__,
            own=as_text(own) or "  it has no options of its own\n",
            common=common_help(device_class),
            explained=EXPLAINED,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the device, listed below")
    add_socket_arguments(parser)
    add_serving_arguments(parser, log_level="info", several=False)
    return parser
