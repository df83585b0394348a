"""Keeper of a device (``serve --supervise``): holds its client, and starts its process again when that has died.

::

    client ◀── socket ──▶ keeper: `Relay` ◀── socket pair ──▶ device's process: server, device, `SupervisedPci`
              accepted by       │ what the client has said once and for all: `ClientState`      │ writes
              the keeper        └──────────────── the journal, a memfd ─────────────────────────┘
"""
