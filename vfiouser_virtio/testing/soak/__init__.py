"""Soak: servers, and guests of theirs, in processes of their own, under load, faults and kills, for as long as wanted.

::

    __main__    scripts/soak
    children    processes that are forked from one that has imported all, and killed at any moment
    ledger      what has been written to a disk, and what was flushed: survives the death of every process but ours
    writer      guest that writes numbered blocks to a disk
    kills       disk whose guest and server are killed again and again
    servers     servers of all device types, honest ones and liars, that are visited all the time
    visits      their guests: good ones, ones that leave in the middle, hostile ones
    linux       Linux guests in QEMU
    growth      what the servers' processes hold, and whether it grows
    report      what was done and what was found, as Markdown and JSON
"""
