"""Configurations that are mistakes or traps: nested, endless, of the wrong kind; consoles' log files that are links."""

from random import Random

from vfiouser_virtio.testing.fuzz.process.case import HostileStep, ProcessCase

_LOG_LIMIT = 257 << 20


def configurations(random: Random) -> ProcessCase:
    """A command that is to end with one line."""
    depth = random.choice((10, 500, 5000, 100_000))
    roll = random.random()
    if roll < 0.6:
        opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
        toml = random.random() < 0.5
        if toml:
            opening, closing = random.choice((("[", "]"), ("{a=", "}")))
        head, tail = ('[[device]]\ndriver="rng"\nx=', "") if toml else ('{"device": ', "}")
        name = "nested.toml" if toml else "nested.json"
        step: HostileStep = {"do": "nested", "name": name, "depth": depth, "opening": opening, "closing": closing}
        files = [step | {"head": head, "tail": tail}]
        options = ["--config", f"{{folder}}/{name}"]
    elif roll < 0.7:
        files, options = [], ["--device", "[" * min(depth, 5000) + "]" * min(depth, 5000)]
    elif roll < 0.8:
        files, options = [], ["--config", random.choice(("/dev/zero", "/dev/full", "/proc/self/mem", "/", "/dev/tty"))]
    elif roll < 0.9:
        files, options = [{"do": "fifo", "name": "fifo.toml"}], ["--config", "{folder}/fifo.toml"]
    else:
        files, options = [{"do": "fifo", "name": "fifo"}], ["--device", "rng,source={folder}/fifo"]
    return ProcessCase("configurations", [], options, files=files, serves=False)


def log_files(random: Random) -> ProcessCase:
    """A console's output in a file: of a name that is a link to another's file, or new."""
    device = "console,chardev=file:{folder}/log"
    steps: list[HostileStep] = [{"do": "connect", "client": 0, "device": 0}]
    if random.random() < 0.5:
        files: list[HostileStep] = [{"do": "guarded", "name": "victim", "text": "not yours"}]
        files.append({"do": "link", "name": "log", "target": "victim"})
        serves = False
    else:
        files, serves = [{"do": "private", "name": "log", "most": _LOG_LIMIT}], True
    if random.random() < 0.2:
        steps.append({"do": "print_text", "client": 0, "text": "x" * 64, "repeat": 1 << 14, "seconds": 10})
    else:
        steps.append({"do": "print_text", "client": 0, "text": "hello\n", "repeat": random.choice((1, 1000))})
    return ProcessCase("log_files", [device, "rng", "rng"], files=files, lanes=[steps], serves=serves)
