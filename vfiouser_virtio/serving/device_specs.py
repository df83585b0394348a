"""Device descriptions as users write them: ``blk,path=disk.img``, JSON, or a TOML or JSON file of devices."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from vfiouser_virtio.errors import ConfigError

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyDevice

# /dev/zero has no end; a device takes some 100 bytes.
MAX_CONFIG_SIZE = 1 << 20


class DeviceSpec(NamedTuple):
    """Description of a device, nothing checked yet: ``driver`` is a name or ``file.py:Class``.

    A value of ``options`` is a text, what JSON or TOML gave, a list where a key was repeated, or None for a bare key.
    """

    driver: str
    options: Mapping[str, object] = {}
    device_class: "type[AnyDevice] | None" = None
    """The class itself, where a program has it: ``driver`` is then what errors call it."""


def is_device_file(driver: str) -> bool:
    """Whether this names a file, and not a device type that comes with the package."""
    return driver.partition(":")[0].endswith(".py")


def parse_device(text: str) -> DeviceSpec:
    """``driver,key=value,key`` as QEMU has it (``,,`` is a comma in a value), or a JSON object with a ``driver``.

    Raises ConfigError.
    """
    if text.lstrip().startswith("{"):
        try:
            return _from_mapping(json.loads(text), "--device")
        except json.JSONDecodeError as error:
            raise ConfigError(f"--device: bad JSON, {error.msg} at character {error.pos + 1} of {text}") from None
        except ValueError as error:  # a number of thousands of digits
            raise ConfigError(f"--device: bad JSON, {error}") from None
        except RecursionError:
            raise ConfigError("--device: bad JSON, nested too deeply") from None
    # No argument of a program can have a NUL in it.
    driver, *pairs = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    driver = driver.removeprefix("driver=")
    if not driver:
        raise ConfigError(f"--device {text}: which device? for example --device rng")
    return DeviceSpec(driver, parse_options(pairs))


def parse_options(pairs: Iterable[str]) -> dict[str, object]:
    """The options of ``key=value`` and bare ``key`` words, as `DeviceSpec` has them."""
    options: dict[str, object] = {}
    for pair in filter(None, pairs):
        key, equals, value = pair.partition("=")
        given: object = value if equals else None
        if key in options:
            before = options[key]
            given = [*before, given] if isinstance(before, list) else [before, given]
        options[key] = given
    return options


def read_config(path: str) -> list[DeviceSpec]:
    """The devices of a file: ``[[device]]`` tables in TOML; in JSON (``*.json``) ``{"device": […]}``, or only the list.

    Raises ConfigError.
    """
    import tomllib  # only here: it takes longer to import than all else in this module

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_SIZE + 1)
        if len(data) > MAX_CONFIG_SIZE:
            raise ConfigError(f"{path}: longer than {MAX_CONFIG_SIZE >> 20} MiB: is it a file of devices?")
        text = data.decode()
        content = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError, TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if isinstance(content, dict):
        if strangers := content.keys() - {"device"}:
            raise ConfigError(f"{path}: '{min(strangers)}' is not known; expected [[device]] tables only")
        content = content.get("device")
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{path}: there is no device; expected [[device]] tables, each with a driver")
    return [_from_mapping(entry, f"{path}: device {number}") for number, entry in enumerate(content, 1)]


def all_specs(configs: Iterable[str], devices: Iterable[str]) -> list[DeviceSpec]:
    """The devices of all files, then those of the command line. Raises ConfigError, also when there is none."""
    specs = [spec for path in configs for spec in read_config(path)]
    specs += [parse_device(text) for text in devices]
    if not specs:
        raise ConfigError("no device: say which with --device, for example --device rng, or with --config FILE")
    return specs


def _from_mapping(content: object, where: str) -> DeviceSpec:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected an object with a driver and its options")
    options = dict(content)
    driver = options.pop("driver", None)
    if isinstance(driver, int) and not isinstance(driver, bool):
        driver = str(driver)  # a virtio device id
    if not isinstance(driver, str) or not driver:
        raise ConfigError(f'{where}: there is no "driver", for example {{"driver": "rng"}}')
    return DeviceSpec(driver, options)
