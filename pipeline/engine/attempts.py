"""Which attempt comes next, and which one counts: the only control flow the line has, as pure functions.

An attempt is chosen on hold-out metrics, size and latency alone. A limit on the test split never decides whether
another attempt is made; it is judged once the choice stands. A result that failed a validity check counts for nothing,
whatever its numbers: the next attempt is made. That cannot flatter: checks fail for looking too robust alone. Only
in `JUDGING` does it end the step: there attempts differ in how hard they look, and a weaker look finds less.
"""

import math
from collections.abc import Sequence

from pipeline.core.gate import Budget, Reason, Verdict
from pipeline.engine.step import Attempt, Bisect, Step

JUDGING = "validate"


def following(step: Step, verdicts: Sequence[Verdict]) -> Attempt | None:
    """The attempt to make after those judged so far; None where the choice stands.

    Bisection: the boldest value, the gentlest, then half-way between the boldest known to pass and the gentlest known
    to be refused, until `probes` are spent or no value lies between. It relies on gentler values passing more easily.
    """
    if step.name == JUDGING and verdicts and _invalid(verdicts[-1]):
        return None
    if step.bisect is not None:
        return _halving(step.bisect, [acceptable(verdict) for verdict in verdicts])
    if any(acceptable(verdict) for verdict in verdicts) or len(verdicts) == len(step.attempts):
        return None
    return step.attempts[len(verdicts)]


def choice(verdicts: Sequence[Verdict], budget: Budget) -> int:
    """The index that counts: the boldest acceptable attempt, else the closest."""
    fitting = [i for i, verdict in enumerate(verdicts) if acceptable(verdict)]
    if fitting:
        return fitting[-1]  # attempts stop at the first that fits; a bisection's later fits are the bolder ones
    return max(range(len(verdicts)), key=lambda i: (closeness(verdicts[i], budget), -i))


def acceptable(verdict: Verdict) -> bool:
    """No refusal other than on the test split."""
    return all(_reads_test(reason) for reason in verdict.refusals)


def closeness(verdict: Verdict, budget: Budget) -> float:
    """The worst margin among the refusals that a choice may look at, each relative to its bound; 0 would just pass.

    Relative to the largest bound named for the metric, or absolute where that is 0. A metric that was not measured
    is infinitely far off, and so is a failed validity check.
    """
    margins = []
    for reason in verdict.refusals:
        if not _reads_test(reason):
            bounds = [b for x in budget if x.metric == reason.metric for b in (x.at_least, x.at_most, x.max_loss) if b]
            scale = max((abs(bound) for bound in bounds), default=1.0)
            margins.append(-math.inf if reason.margin is None else reason.margin / scale)
    return min(margins, default=0.0)


def _halving(bisect: Bisect, passed: Sequence[bool]) -> Attempt | None:
    if not passed:
        return bisect.attempt(bisect.boldest)
    if passed[0] or len(passed) >= bisect.probes or not all(passed[1:2]):
        return None
    if len(passed) == 1:
        return bisect.attempt(bisect.gentlest)
    refused, fits = bisect.boldest, bisect.gentlest
    for index in range(2, len(passed) + 1):
        middle = (refused + fits) / 2
        if bisect.integer:
            middle = round(middle)
        if middle in (refused, fits):
            return None
        if index == len(passed):
            return bisect.attempt(middle)
        refused, fits = (refused, middle) if passed[index] else (middle, fits)
    return None


def _invalid(verdict: Verdict) -> bool:
    return any(reason.metric == "validity" for reason in verdict.refusals)


def _reads_test(reason: Reason) -> bool:
    return reason.metric.endswith(".test")
