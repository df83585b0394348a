"""Background tasks for the length of a block, whose own exception comes out without a group around it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled at the end of the block. One that fails ends the block with its exception.

    Where several have failed, or the block itself and a task, all of it comes out as one group.
    """
    ended: BaseException | None = None
    try:
        try:
            async with trio.open_nursery() as nursery:
                try:
                    yield nursery
                except BaseException as error:
                    ended = error
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            ended = _joined(ended, group)
        if ended is not None:
            context = ended.__context__
            try:
                raise ended
            finally:
                ended.__context__ = context  # not that the block was cancelled, which the failure of a task does to it
    finally:
        # Else they and this frame keep each other, and whatever the frames below it have.
        ended = context = None


def _joined(own: BaseException | None, group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a block has raised, and the group of what its tasks have: as one exception."""
    failed = list(group.exceptions)
    if own is not None and (own := _without_cancellation(own)) is not None:
        failed.insert(0, own)
    if len(failed) > 1:
        return BaseExceptionGroup("a block and the tasks beside it", failed)
    return failed[0]


def _without_cancellation(error: BaseException) -> BaseException | None:
    """What has gone wrong in the block itself: that it is cancelled is what the failure of a task does to it."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1]
    return None if isinstance(error, trio.Cancelled) else error
