"""The command as a whole: versions, help, lists, usage."""

import json

import pytest
from support.command import run_command

import vfiouser_virtio


def test_version() -> None:
    assert run_command("--version").stdout == f"vfiouser-virtio {vfiouser_virtio.__version__}\n"


@pytest.mark.parametrize("command", ["serve", "run", "qemu-args", "list-devices"])
def test_help_teaches_by_example(command: str) -> None:
    ended = run_command(command, "--help")
    assert ended.returncode == 0
    assert f"\n  vfiouser-virtio {command}" in ended.stdout
    assert "exit status:" in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["nosuch"], ["serve", "--nosuch"], ["serve", "--device", "rng", "--", "-m", "1G"], ["serve", "--fd", "x"]],
)
def test_usage(arguments: list[str]) -> None:
    ended = run_command(*arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_device_without_its_option() -> None:
    """As `fuzz my_chip.py:MyChip` is written."""
    said = run_command("serve", "my_chip.py:MyChip,id=a").stderr
    assert "error: unrecognized arguments: my_chip.py:MyChip,id=a (a device is --device my_chip.py:MyChip,id=a)" in said
    assert run_command("run", "--nosuch").stderr.endswith("error: unrecognized arguments: --nosuch\n")


def test_list_devices() -> None:
    text = run_command("list-devices").stdout
    assert text.index("blk: ") < text.index("console: ") < text.index("rng: ") < text.index("every device:")
    listed = json.loads(run_command("list-devices", "--json", "blk").stdout)
    (blk,) = listed["devices"]
    assert (blk["name"], blk["virtio-id"]) == ("blk", 2)
    readonly = next(option for option in blk["options"] if option["name"] == "readonly")
    assert (readonly["type"], readonly["default"], readonly["required"]) == ("on|off", False, False)
    assert "socket" in [option["name"] for option in listed["common-options"]]
    assert run_command("list-devices", "bkl").returncode == 2


def test_no_colour_where_there_is_no_terminal() -> None:
    assert "\x1b" not in run_command("serve", "--device", "nosuch").stderr
