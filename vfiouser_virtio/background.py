"""Background tasks for the length of a block, whose own exception comes out without a group around it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled at the end of the block. One that fails ends the block with its exception.

    Where several have failed, or the block itself and a task, all of it comes out as one group.
    """
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failed = list(group.exceptions)
        if raised is not None and (own := _without_cancellation(raised)) is not None:
            failed.insert(0, own)
        if len(failed) == 1:
            raise failed[0] from None
        raise BaseExceptionGroup("a block and the tasks beside it", failed) from None
    if raised is not None:
        raise raised


def _without_cancellation(error: BaseException) -> BaseException | None:
    """What has gone wrong in the block itself: that it is cancelled is what the failure of a task does to it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1]
    return None if isinstance(error, trio.Cancelled) else error
