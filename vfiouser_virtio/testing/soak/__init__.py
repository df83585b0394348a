"""Soak: servers and Python guests in processes of their own, under mixed load, faults and kills, for as long as wanted.

::

    __main__    scripts/soak
    children    processes that are forked from one that has imported all, and killed at any moment
    ledger      what has been written to a disk, and what was flushed: survives the death of every process but ours
    writer      guest that writes numbered blocks to a disk
    kills       a disk whose guest and server are killed again and again
    visits      guests of all other devices: good ones, ones that leave in the middle, hostile ones
    servers     the devices that they visit
    growth      what the servers' processes hold, and whether it grows
    report      what was done and what was found, as Markdown and JSON
"""
