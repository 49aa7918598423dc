"""How far a conversion or a load has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A point reached in one stage.

    Attributes:
      stage: what is being done, such as ``verify_files``, ``restore`` or ``verify_arrays``.
      done: units finished: bytes, unless the stage counts something else.
      total: units of the whole stage.
    """

    stage: str
    done: int
    total: int

    @property
    def percent(self) -> int:
        """Whole percent, 0 to 100. A stage with nothing to do is finished."""
        return min(100, max(0, self.done * 100 // self.total)) if self.total > 0 else 100
