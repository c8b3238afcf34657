"""Why an image is not proved, in one word each; whoever sums up counts the words."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Reason = Literal["uncovered", "loose", "memory", "time", "broken"]
REASONS: tuple[Reason, ...] = ("uncovered", "loose", "memory", "time", "broken")
"""No certifier has a rule; bounds leave the answer open; a certifier's memory does not hold it; the time was over; it
is read wrongly, as it is or by an attack. A later word counts before an earlier one: what more memory or time may
change says so, however loose other bounds were."""


def settled(why: Sequence[Reason | None], proved: Tensor, standing: Tensor) -> list[Reason | None]:
    """One word for every image, None where proved: what no attack broke keeps its word of `why`.

    proved, standing: bool [N]. A proof may be lost to what is taken off every bound; such bounds are too loose.
    """
    found: list[Reason | None] = []
    for word, held, stands in zip(why, proved.tolist(), standing.tolist(), strict=True):
        found.append("broken" if not stands else None if held else word or "loose")
    return found


def counts(why: Sequence[Reason | None]) -> dict[str, int]:
    """How often each word stands, those that do."""
    found = Counter(word for word in why if word is not None)
    return {word: found[word] for word in REASONS if found[word]}
