"""Requests that wait for a slot: owners take turns, and none may fill the queue."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from titans_runtime.errors import OverloadError
from titans_runtime.serving.run import Run


class Waiting:
    """A queue for each owner. Its user locks; the length may be read without."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """``most``: requests in all; ``most_of_one``: of one owner."""
        self._most, self._most_of_one = most, most_of_one
        self._queues: OrderedDict[str, deque[Run]] = OrderedDict()  # the next owner first; none is empty

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in list(self._queues.values()))

    def add(self, run: Run) -> None:
        """Queue a request.

        Raises:
            OverloadError: the queue is full, of all or of this owner.
        """
        own = self._queues.get(run.request.owner, ())
        if len(self) >= self._most:
            raise OverloadError(f"{len(self)} requests wait already, which is the limit; ask again later")
        if len(own) >= self._most_of_one:
            raise OverloadError(
                f"{len(own)} requests of yours wait already, which is the limit; ask again later"
            )
        self._queues.setdefault(run.request.owner, deque()).append(run)

    def pop(self) -> Run | None:
        """The next request, of the owner whose turn it is; None where none waits."""
        if not self._queues:
            return None
        owner, queue = next(iter(self._queues.items()))
        run = queue.popleft()
        self._queues.move_to_end(owner)
        if not queue:
            del self._queues[owner]
        return run

    def pop_where(self, chosen: Callable[[Run], object]) -> list[Run]:
        """Take out all that are chosen."""
        found = []
        for owner, queue in list(self._queues.items()):
            taken = [run for run in queue if chosen(run)]
            for run in taken:
                queue.remove(run)
            if not queue:
                del self._queues[owner]
            found += taken
        return found
