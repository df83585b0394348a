"""Matrix of what Linux makes of each fault of the catalogue: a guest for each, results that are kept, a table.

::

    cases ──▶ __main__: those without a result ──▶ one, in a process: a guest with the device and a neighbour of it
                 │                                   exercises: what the guest does, and what the host does beside it
                 ▼                                   classify: what has come of it, from what the guest has said
              results.jsonl ──▶ table, in docs/evil.md
"""
