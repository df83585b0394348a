"""Exit statuses of the command, and the error that each stands for."""

from enum import IntEnum

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.serving.errors import ProcessError, StuckError


class ExitStatus(IntEnum):
    """Exit statuses, documented in every ``--help``; `run --exec` ends with the status of its command instead."""

    OK = 0
    FAILED = 1
    USAGE = 2
    LISTEN = 3
    DEVICE = 4
    GUEST = 5
    OUTPUT = 6
    NO_SERVER = 7
    AUDIT = 8
    TIMEOUT = 124


EXPLAINED = """\
exit status:
  0  done: the clients have left, or a signal asked to stop
  1  conform: a check has failed; fuzz: something was found; with --processes: the process of a device has died
  2  the command line or a configuration file is wrong
  3  a socket cannot be listened on
  4  a device cannot be made from its options (no such file, …)
  5  QEMU or the guest could not be set up, or failed
  6  what was to be printed could not be: stdout is full, or the reader of what `run --exec` prints is gone
     (of the other commands that is no failure: `list-devices | head` ends with 0)
  7  conform, probe, fuzz socket: the socket has no listener, the server is busy, or it is no vfio-user server
  8  --audit: a driver has broken a rule of virtio 1.4 (a MUST), and nothing else went wrong
  124  run --timeout: the guest's command had not ended
  128+N  signal N ended `run`, or had to interrupt a device that did not yield
"""


class RunError(ConfigError):
    """Failure of QEMU or its guest: it could not be set up, or did not do what it was to do."""


class OutputError(ConfigError):
    """Output that could not be printed."""


class TimedOutError(ConfigError):
    """End of the time that `run --timeout` gives."""


class NoServerError(ConfigError):
    """No vfio-user server to talk to where the user said: no listener, a busy server, or one of another kind."""


def status_of(error: ConfigError) -> int:
    """The exit status for an error of the user's."""
    # Only here, because it brings all of trio with it, which --help and --version do without.
    from vfiouser_virtio.vfio_user import ListenError

    if isinstance(error, StuckError):
        return error.status
    table = {
        OutputError: ExitStatus.OUTPUT,
        TimedOutError: ExitStatus.TIMEOUT,
        RunError: ExitStatus.GUEST,
        ListenError: ExitStatus.LISTEN,
        DeviceError: ExitStatus.DEVICE,
        ProcessError: ExitStatus.FAILED,
        NoServerError: ExitStatus.NO_SERVER,
    }
    return next((status for kind, status in table.items() if isinstance(error, kind)), ExitStatus.USAGE)
