"""What is told of a merge while it runs, and how it is stopped."""

from __future__ import annotations

from typing import Protocol

from app.planning.plan import TensorPlan
from app.tasks.task import TaskScore
from worker.engine.blocks import Block
from worker.engine.digests import SourceDigests
from worker.engine.reader import dtype_of


class Control(Protocol):
    """How a merge is watched and stopped. All calls come from the thread that runs the merge."""

    def stage(self, name: str) -> None:
        """``merging`` once the plan is taken up, ``publishing`` once every weight is written, and before it
        ``evaluating`` where the result is scored."""
        ...

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """After every block, so it should be cheap.

        ``bytes_total`` is the bytes of the output's tensors, and for every pass over the whole model that may be
        needed those that it reads once more, of all documents of the recipe; it never changes during a merge, and
        ``bytes_done`` never falls.
        """
        ...

    def scored(self, score: TaskScore) -> None:
        """The result was scored on a task."""
        ...

    def check(self) -> None:
        """Called after every block, and every so often while files are hashed.

        Whatever it raises stops the merge and leaves nothing behind.
        """
        ...


class Meter:
    """Counts the bytes done of one document, and gives the caller and the hashing thread their say after every block.

    ``before`` bytes of ``whole`` are those of the documents before it.
    """

    def __init__(self, control: Control, hashing: SourceDigests, total: int, *, before: int, whole: int) -> None:
        self._control, self._hashing, self._total = control, hashing, total
        self._before, self._whole = before, whole
        self._done = 0

    def count(self, tensor: TensorPlan, block: Block) -> None:
        self.advance(block.size * dtype_of(tensor.dtype, tensor.name).itemsize)

    def watch(self, _tensor: TensorPlan, _block: Block) -> None:
        """A block of a pass within one tensor, whose bytes count when they are written."""
        self.check()

    def check(self) -> None:
        self._hashing.check()
        self._control.check()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self.check()
        self._control.progress(self._before + self._done, self._whole)

    def complete(self) -> None:
        self.reach(self._total)

    def reach(self, nbytes: int) -> None:
        self.advance(max(0, nbytes - self._done))
