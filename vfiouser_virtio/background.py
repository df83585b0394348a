"""Tasks beside a block, whose own exception comes out as it is: a group around it would only hide what has failed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled at the end of the block. One that fails ends the block with its exception."""
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        # Of the block there is only its cancellation, by this task's failure.
        raise group.exceptions[0] from None
    if raised is not None:
        raise raised
