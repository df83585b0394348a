"""Devices as users describe them: QEMU's way, in JSON, in files."""

from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.device_specs import DeviceSpec, all_specs, parse_device, read_config


@pytest.mark.parametrize(
    ("text", "driver", "options"),
    [
        ("rng", "rng", {}),
        ("driver=rng,id=a", "rng", {"id": "a"}),
        ("blk,path=a,,b.img,readonly", "blk", {"path": "a,b.img", "readonly": None}),
        ("blk,path=a,,,id=x", "blk", {"path": "a,", "id": "x"}),
        ("blk,path=k=v", "blk", {"path": "k=v"}),
        ("console,chardev=pty,chardev=stdio,chardev=null", "console", {"chardev": ["pty", "stdio", "null"]}),
        ("dir,,x/my.py:My,key=", "dir,x/my.py:My", {"key": ""}),
        ('{"driver": "blk", "size": 512, "readonly": true}', "blk", {"size": 512, "readonly": True}),
    ],
)
def test_parse(text: str, driver: str, options: dict[str, object]) -> None:
    assert parse_device(text) == DeviceSpec(driver, options)


@pytest.mark.parametrize("text", ["", ",path=x", '{"path": "x"}', '{"driver": 3.5}', '{"driver": true}', '{"driver"'])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_device(text)


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml, json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text(
        '[[device]]\ndriver = "blk"\nsize = "1M"\n[[device]]\ndriver = "console"\nchardev = ["pty", "null"]\n'
    )
    json.write_text('{"device": [{"driver": "blk", "size": "1M"}, {"driver": "console", "chardev": ["pty", "null"]}]}')
    expected = [DeviceSpec("blk", {"size": "1M"}), DeviceSpec("console", {"chardev": ["pty", "null"]})]
    assert read_config(str(toml)) == read_config(str(json)) == expected
    assert all_specs([str(toml)], ["rng"]) == [*expected, DeviceSpec("rng")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", "device = 3", "no device"),
        ("a.toml", "[[device]\n", "line 1"),
        ("a.toml", "[[devices]]\ndriver = 'rng'", "'devices' is not known"),
        ("a.toml", "[[device]]\npath = 'x'", "device 1: there is no"),
        ("a.json", "[3]", "device 1: expected an object"),
        ("a.json", "[", "line 1"),
        ("a.json", "[]", "no device"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.toml", "a = " + "[" * 100_000, "nested too deeply"),
        ("a.toml", "#" * (1 << 20) + "#", "longer than 1 MiB"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_an_end() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: longer than 1 MiB"):
        read_config("/dev/zero")


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 10_000])
def test_json_that_python_cannot_hold(value: str) -> None:
    with pytest.raises(ConfigError, match="--device: bad JSON"):
        parse_device('{"driver": "rng", "id": ' + value)


def test_missing_file_and_no_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="no device"):
        all_specs([], [])
