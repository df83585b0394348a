"""Devices on sockets: from a description or an object to a server, its processes, its log and its end.

The names for authors are in `vfiouser_virtio` itself. Nothing is imported here: the command line's ``--help`` reads
`terminal` only, and does without trio.
"""
