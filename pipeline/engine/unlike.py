"""Whether two stages measure an accuracy alike, so that the loss between them means something."""

from itertools import product

from pipeline.core.stage import MEASURING
from pipeline.engine.sections import Section

_ATTACKED = ("attacks", "certify", "holdout_attack")


def unlike(metric: str, earlier: Section, later: Section) -> str | None:
    """Why `max_loss` on `metric` cannot compare the two; None where it can.

    Every attempt of the one meets every attempt of the other. Counts of parameters and the like are exact, whatever the
    rest; a clean accuracy depends on the images alone, not on the attack.
    """
    if not metric.startswith("accuracy."):
        return None
    keys = [key for key in MEASURING if not (metric.startswith("accuracy.clean.") and key in _ATTACKED)]
    for was, now in product(_configs(earlier), _configs(later)):
        for key in keys:
            if was.get(key) != now.get(key):
                return f"{later.name}.{key} and {earlier.name}.{key} differ; set them alike"
    return None


def _configs(section: Section) -> list[dict[str, object]]:
    attempts = section.attempts if section.bisect is None else (section.bisect.base,)
    return [attempt.config for attempt in attempts]
