"""``qemu-args``: QEMU's arguments, or libvirt XML, for devices that are served already."""

import argparse
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import SubParsers, add_command, add_device_arguments, add_log_arguments
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.terminal import say

if TYPE_CHECKING:
    from vfiouser_virtio.serving.guest_slots import GuestSlot


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "qemu-args",
        summary="print the QEMU arguments for sockets",
        description="Print, ready for a shell, the QEMU arguments for devices that `serve` serves on known sockets.",
        usage="--socket PATH … | --device DEVICE,socket=PATH … [options]",
        examples="  vfiouser-virtio qemu-args --socket /run/vm/blk0.sock --socket /run/vm/rng0.sock\n"
        "  eval qemu-system-x86_64 $(vfiouser-virtio qemu-args --config devices.toml) -kernel bzImage\n"
        "  vfiouser-virtio qemu-args --socket /run/vm/blk0.sock --libvirt\n",
    )
    add_device_arguments(parser)
    parser.add_argument("--socket", action="append", default=[], metavar="PATH", help="a socket, whatever serves it")
    parser.add_argument("--memory", choices=("shared", "private"), default="shared", help="of the guest")
    parser.add_argument("--memory-size", default="1G", metavar="SIZE", help="of the guest (default: 1G)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--libvirt", action="store_true", help="XML for a libvirt domain instead")
    form.add_argument(
        "--hotplug",
        action="store_true",
        help="QMP commands for a running QEMU instead; on q35 give each device bus=ID of a pcie-root-port",
    )
    add_log_arguments(parser, log_level="warning")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the arguments."""
    import os

    from vfiouser_virtio.serving import qemu_command
    from vfiouser_virtio.serving.guest_slots import GuestSlot

    places = [(f"vu{number}", path, GuestSlot()) for number, path in enumerate(arguments.socket)]
    if arguments.device or arguments.config:
        places = _described(arguments) + places
    if not places:
        raise ConfigError("no socket: name each with --socket PATH, or in a device's options with socket=PATH")
    devices = [qemu_command.qemu_device(name, os.path.abspath(path), place) for name, path, place in places]
    if arguments.libvirt:
        say(qemu_command.libvirt_xml(devices))
    elif arguments.hotplug:
        say(qemu_command.hotplug_commands(devices))
    else:
        found = qemu_command.qemu_arguments(devices, memory=arguments.memory, size=arguments.memory_size)
        say(qemu_command.shell_lines("", found))
    return 0


def _described(arguments: argparse.Namespace) -> "list[tuple[str, str, GuestSlot]]":
    """Name, socket and place of each device of --device and --config."""
    from vfiouser_virtio.serving.device_setup import setups
    from vfiouser_virtio.serving.device_specs import all_specs

    places = []
    for setup in setups(all_specs(arguments.config, arguments.device)):
        if setup.common.socket is None:
            raise ConfigError(f"{setup.name} has no socket that is known in advance: add socket=PATH to its options")
        places.append((setup.name, str(setup.common.socket), setup.place))
    return places
