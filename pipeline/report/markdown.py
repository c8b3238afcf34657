"""A view as Markdown, for logs, merge requests and terminals."""

import re
from collections.abc import Iterable, Sequence

from pipeline.report import words
from pipeline.report.rows import AttemptView, Demand, View

_TAG = re.compile("<(?=[A-Za-z/!?])")  # what could begin markup; "<=" reads better as it is
KEPT = "it kept its limits; a bolder one that also passed was chosen"
_SIGN = {True: "✓", False: "✗"}


def render(view: View) -> str:
    """The same as the page, without pictures; equal views give equal text."""
    parts = [
        f"# {_safe(view.name)} for {_safe(view.target)}",
        f"**{_safe(view.headline)}**",
        *(_safe(sentence) for sentence in view.sentences),
        _list(view.owed),
    ]
    if view.tiles:
        parts.append(_table(("", "", ""), ((f"**{t.title}**", t.value, t.note) for t in view.tiles)))
    if view.changes is not None:
        bad = sum(change.regressed for change in view.changes)
        parts += [
            "## Against the baseline",
            f"{bad} of {len(view.changes)} numbers regressed." if bad else "Nothing regressed.",
        ]
        rows = (
            (f"`{c.metric}`", c.stage, c.before, c.after, f"**✗ {c.word}**" if c.regressed else c.word, c.detail)
            for c in view.changes
        )
        parts.append(_table(("metric", "stage", "baseline", "now", "change", "why"), rows))
    parts += ["## The line, stage by stage", *_stages(view)]
    if view.verdicts:
        counts = (
            (
                v.of,
                _part(v.proved, v.images),
                _part(v.open, v.images) + v.reasons,
                _part(v.broken, v.images),
                str(v.wrong),
                str(v.images),
            )
            for v in view.verdicts
        )
        head = ("of", "proved", "open", "broken", "of these wrong without an attack", "images")
        parts += ["## Proved, open and broken", _table(head, counts)]
    for plot in view.scatters:
        points = (
            (
                p.label,
                p.series,
                words.quantity(p.x, plot.unit),
                words.quantity(p.y, "fraction"),
                words.share_between(p.low, p.high),
                "" if p.counted else "set aside",
            )
            for p in plot.points
        )
        parts += [
            f"## Accuracy against {plot.title}",
            _table(("attempt", "accuracy", plot.title, "value", "95 %", ""), points),
        ]
    if view.curve:
        rows_of = (
            (p.attack, f"{p.eps:.4g}", words.quantity(p.value, "fraction"), words.share_between(p.low, p.high))
            for p in view.curve
        )
        parts += ["## Accuracy against the size of the change", _table(("attack", "eps", "accuracy", "95 %"), rows_of)]
    if view.confused:
        parts += ["## What is taken for what", _list(view.confused)]
    if view.validity:
        checks = tuple(f"{_SIGN[c.ok]} **{_safe(c.name)}**: {_safe(c.text)}" for c in view.validity)
        parts += ["## Are the attacks to be believed?", _list(checks, safe=True)]
    if view.attacks:
        parts += [f"### {view.attacks.title}", _table(view.attacks.head, view.attacks.rows)]
    parts += ["## What the numbers mean, and what they do not"]
    parts.append(_list(tuple(f"**{_safe(term)}**: {_safe(text)}" for term, text in view.meaning), safe=True))
    parts += [
        "## Lineage",
        _table(("", ""), (*view.environment, *((f"digest of the {n}", f"`{d}`") for n, d in view.digests))),
    ]
    if view.artifacts:
        digests = ((stage, f"`{name}`", f"`{sha}`") for stage, name, sha in view.artifacts)
        parts += ["### Digests of files", _table(("stage", "file", "SHA-256"), digests)]
    for table in view.tables:
        parts += [f"### {table.title}", _table(table.head, table.rows)]
    parts += [_safe(problem) for problem in view.problems]
    return "\n\n".join(part for part in parts if part) + "\n"


def _stages(view: View) -> Iterable[str]:
    for stage in view.stages:
        if not stage.attempts:
            yield f"### {stage.name}: {stage.status}"
            continue
        counted = stage.counted
        facts = [stage.method, counted.overrides if counted else "", _time(counted) if counted else ""]
        yield f"### {stage.name}: {stage.status}"
        yield _safe(", ".join(fact for fact in facts if fact))
        if counted is not None:
            yield _list(tuple(_demand(d) for d in counted.demands), safe=True) or "No limit is set on this stage."
            rows = ((f"`{n.name}`", n.value, n.interval, n.samples) for n in counted.numbers)
            yield _table(("metric", "value", "95 %", "samples"), rows) if counted.numbers else ""
        aside = [attempt for attempt in stage.attempts if attempt is not counted]
        yield _list(
            tuple(f"set aside: {a.overrides or 'as configured'}: {'; '.join(a.refusals) or KEPT}" for a in aside)
        )


def _part(count: int, images: int) -> str:
    return f"{count} ({words.quantity(count / images, 'fraction')})"


def _time(attempt: AttemptView) -> str:
    return "reused from the store" if attempt.reused else attempt.seconds


def _demand(demand: Demand) -> str:
    sign = "◷" if demand.owed else _SIGN[demand.ok]
    return f"{sign} {_safe(demand.text)}" + (f" ({demand.margin})" if demand.margin else "")


def _list(items: Sequence[str], safe: bool = False) -> str:
    return "\n".join(f"- {item if safe else _safe(item)}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(str(value)) for value in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _TAG.sub("&lt;", text.replace("|", "\\|").replace("\n", " "))


def _safe(text: str) -> str:
    """Text of the record must not become markup."""
    for sign in "\\`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return _TAG.sub("&lt;", text.replace("\n", " "))
