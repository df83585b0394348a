"""Error of a device that cannot go on where its last process has died."""


class CannotResume(Exception):
    """Reason why a device needs a reset after its process has died: a clause for the log."""
