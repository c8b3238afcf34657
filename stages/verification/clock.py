"""How long there is left."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Clock:
    """Counts from when it was made, or from `start` on time.monotonic."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds, negative when time is up."""
        return self.seconds - self.spent()

    def spent(self) -> float:
        return time.monotonic() - self.start

    def share(self, part: float) -> "Clock":
        """A clock that stops after this part of what is left."""
        return Clock(max(self.left(), 0.0) * part)
