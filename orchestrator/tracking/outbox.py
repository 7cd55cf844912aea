"""Rows that wait to be sent to MLflow, oldest first, and the cursor: how many rows of each file it has got."""

from collections import deque

from orchestrator.tracking.history import AppendedRow

_BATCH = 900  # MLflow takes at most 1000 metrics, params and tags at once


FileRow = tuple[str, AppendedRow]  # a row, and the file that it comes from


class Outbox:
    """The rows that wait, each with the file that it comes from."""

    def __init__(self) -> None:
        waiting: deque[FileRow] = deque()
        self.cursor: dict[str, int] = {}
        self._waiting = waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, file: str, row: AppendedRow) -> None:
        """Let a row wait behind all others."""
        waiting = (file, row)
        self._waiting.append(waiting)

    def go_on_from(self, cursor: dict[str, int]) -> None:
        """Take over the cursor of an earlier attempt, and drop the rows that lie before it."""
        self.cursor = cursor
        waiting: deque[FileRow] = deque()
        for file, row in self._waiting:
            if row.index >= cursor.get(file, 0):
                waiting.append((file, row))
        self._waiting = waiting

    def sources(self) -> set[tuple[str, int]]:
        """The files that the waiting rows come from, each with its attempt."""
        sources = set()
        for file, row in self._waiting:
            sources.add((file, row.attempt))
        return sources

    def batch(self) -> list[FileRow]:
        """The oldest rows that wait, with at most 900 metrics."""
        metrics = 0
        batch: list[FileRow] = []
        for file, row in self._waiting:
            metrics += len(row.fresh)
            if metrics > _BATCH and batch:
                break
            batch.append((file, row))
        return batch

    def cursor_after(self, batch: list[FileRow]) -> dict[str, int]:
        """The cursor once MLflow has a batch."""
        cursor = dict(self.cursor)
        for file, row in batch:
            cursor[file] = row.index + 1
        return cursor

    def remove(self, batch: list[FileRow]) -> None:
        """Remove a batch that MLflow has got."""
        self.cursor = self.cursor_after(batch)
        for _ in batch:
            self._waiting.popleft()
