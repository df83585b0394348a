"""State of a device in shared memory: another process can go on where its own has died (docs/supervision.md).

What is here is the device's side of ``serve --supervise``; `serving.keeper` is the process that holds the client.
"""
