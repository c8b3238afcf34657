"""Views as inline SVG. Colours are the page's CSS variables, so that light, dark and print need one drawing.

Every drawing has a text alternative and tooltips; shapes repeat what colours say.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from pipeline.report import words
from pipeline.report.figures import CurvePoint, Shares
from pipeline.report.rows import Bar, Scatter

W, H = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 44
_COLOURS = ("robust", "clean", "certified", "fourth", "fifth")
_BAR, _NARROW = 720, 290  # pixels that a bar has at least, on a wide page and on a narrow one
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
Scale = Callable[[float], float]


def margin_bar(bar: Bar) -> str:
    """The interval (a gauge where it is one value) with its value as a line and the bound as a post.

    The side that passes is shaded.
    """
    gauge = bar.low == bar.high
    low, high = min(bar.low, bar.bound), max(bar.high, bar.bound)
    pad = max(high - low, 0.1 * abs(bar.bound), 1e-9) * 0.35
    low, high = low - pad, high + pad
    if bar.unit == "fraction":
        low, high = max(low, 0.0), min(high, 1.0)
    elif gauge:
        low, high = 0.0, max(bar.high, bar.bound) * 1.15 or 1.0
    x = _linear(low, high, 4, 256)
    start, end = (x(bar.bound), 256.0) if bar.allowed == "above" else (4.0, x(bar.bound))
    left, right = (4.0, x(bar.value)) if gauge else (x(bar.low), x(bar.high))
    between = "" if gauge else f", from {words.quantity(bar.low, bar.unit)} to {words.quantity(bar.high, bar.unit)}"
    bound = words.quantity(bar.bound, bar.unit)
    label = f"measured {words.quantity(bar.value, bar.unit)}{between}; {bar.allowed} {bound} passes"
    anchor = "end" if x(bar.bound) > 200 else ("start" if x(bar.bound) < 60 else "middle")
    return "".join(
        [
            f'<svg class="bar" viewBox="0 0 260 34" role="img" aria-label="{escape(label)}">',
            f"<title>{escape(label)}</title>",
            '<rect class="track" x="4" y="8" width="252" height="8" rx="4"/>',
            f'<rect class="allowed" x="{start:.1f}" y="8" width="{max(end - start, 0):.1f}" height="8" rx="4"/>',
            f'<rect class="fill-{"ok" if bar.ok else "bad"}" x="{left:.1f}" y="{8 if gauge else 6}" '
            f'width="{max(right - left, 3.0):.1f}" height="{8 if gauge else 12}" rx="3"/>',
            f'<path class="value" d="M{x(bar.value):.1f} 4V20"/>',
            f'<path class="limit" d="M{x(bar.bound):.1f} 1V22"/>',
            f'<text x="{x(bar.bound):.1f}" y="33" text-anchor="{anchor}">limit {escape(bound)}</text></svg>',
        ]
    )


def shares_bar(shares: Shares) -> str:
    """Proved, open and broken as parts of one bar in this order, each with its share in it where there is room.

    It grows in width alone, so letters keep their size; what fits is asked for a wide page and for a narrow one. What
    is open is hatched, so that colours are not needed to tell the parts apart.
    """
    counts = {"proved": shares.proved, "open": shares.open, "broken": shares.broken}
    told = ", ".join(f"{name} {count} of {shares.images}" for name, count in counts.items())
    label = escape(f"{shares.of}: {told}")
    parts = [f'<svg class="shares" role="img" aria-label="{label}"><title>{label}</title>']
    at = 0.0
    for name, count in counts.items():
        share = 100 * count / shares.images
        parts.append(f'<rect class="part-{name}" x="{at:.2f}%" y="0" width="{share:.2f}%" height="100%"/>')
        if name == "open":
            marks = (f"{at + 0.6 * k:.2f}" for k in range(1, math.ceil(share / 0.6)))
            parts += [f'<line class="hatch" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x in marks]
        number = words.quantity(count / shares.images, "fraction")
        for width, kind in ((_BAR, "roomy"), (_NARROW, "tight")):
            fits = (text for text in (f"{name} {number}", number) if 8 * len(text) + 12 <= share / 100 * width)
            if text := next(fits, ""):
                place = f'x="{at + share / 2:.2f}%" y="23" text-anchor="middle"'
                parts.append(f'<text class="{kind} on-{name}" {place}>{text}</text>')
        at += share
    return "".join([*parts, "</svg>"])


def curve(points: Sequence[CurvePoint], eps: float | None) -> str:
    """Accuracy against the radius, one line with its interval per attack; the threat's radius is marked."""
    attacks = list(dict.fromkeys(point.attack for point in points))
    top = max([*(point.eps for point in points), eps or 0.0]) or 1.0
    x, y = _linear(0, top, LEFT, W - RIGHT), _linear(0, 1, H - BOTTOM, TOP)
    parts = _frame(x, y, _ticks(0, top), "eps: largest change, in pixel units", lambda v: f"{v:g}")
    if eps is not None:
        parts.append(f'<path class="threat" d="M{x(eps):.1f} {TOP}V{H - BOTTOM}"/>')
        side, shift = ("end", -5) if x(eps) > W / 2 else ("start", 5)
        parts.append(
            f'<text class="small" x="{x(eps) + shift:.1f}" y="{TOP + 10}" text-anchor="{side}">the threat</text>'
        )
    for i, attack in enumerate(attacks):
        colour = _colour(i)
        line = sorted((p for p in points if p.attack == attack), key=lambda p: p.eps)
        band = [(x(p.eps), y(p.high)) for p in line] + [(x(p.eps), y(p.low)) for p in reversed(line)]
        parts.append(f'<polygon class="band fill-{colour}" points="{_join(band)}"/>')
        parts.append(f'<polyline class="line ink-{colour}" points="{_join([(x(p.eps), y(p.value)) for p in line])}"/>')
        parts += [
            _mark(
                x(p.eps), y(p.value), i, colour, True, f"{attack} at {p.eps:.4g}: {words.quantity(p.value, 'fraction')}"
            )
            for p in line
        ]
    drawing = _drawing(parts, f"Accuracy against the size of the change, for {', '.join(attacks)}")
    return drawing + _legend(attacks, range(len(attacks)), [_colour(i) for i in range(len(attacks))])


def scatter(plot: Scatter, series: Sequence[str]) -> str:
    """Accuracies against a cost; hollow marks are attempts that a gate set aside."""
    size, unit = _divisor([point.x for point in plot.points], plot.unit)
    low, high = (end([point.x for point in plot.points]) / size for end in (min, max))
    logarithmic = low > 0 and high / low > 8
    if logarithmic:
        inner = _linear(math.log(low * 0.7), math.log(high * 1.4), LEFT, W - RIGHT)
        x: Scale = lambda value: inner(math.log(value))  # noqa: E731
        ticks = _log_ticks(low * 0.7, high * 1.4)
    else:
        pad = (high - low) * 0.12 or high * 0.3 or 1.0
        first, last = max(0.0, low - pad), high + pad
        x, ticks = _linear(first, last, LEFT, W - RIGHT), _ticks(first, last)
    y = _linear(0, 1, H - BOTTOM, TOP + 16)
    parts = _frame(x, y, ticks, f"{plot.title}, {unit}{' (logarithmic)' if logarithmic else ''}", lambda v: f"{v:.3g}")
    groups = sorted({(point.x, point.label) for point in plot.points})
    free = 0.0
    for letter, (cost, _) in zip(_LETTERS, groups, strict=False):
        free = max(x(cost / size), free)
        parts.append(f'<path class="grid" d="M{x(cost / size):.1f} {TOP + 16}V{H - BOTTOM}"/>')
        parts.append(f'<text class="strong" x="{free:.1f}" y="{TOP + 6}" text-anchor="middle">{letter}</text>')
        free += 12
    for point in plot.points:
        i = series.index(point.series)
        at = x(point.x / size) + (i - 1) * 3  # a little apart, so that equal costs do not hide one another
        faint = "" if point.counted else " faint"
        tip = (
            f"{point.label}: {point.series} {words.quantity(point.y, 'fraction')} "
            f"({100 * point.low:.1f} to {100 * point.high:.1f} %) at {words.quantity(point.x, plot.unit)}"
            f"{'' if point.counted else ', set aside'}"
        )
        kind = f"whisker ink-{point.series}{faint}"
        parts.append(f'<path class="{kind}" d="M{at:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>')
        parts.append(_mark(at, y(point.y), i, point.series, point.counted, tip))
    shown = [name for name in series if any(point.series == name for point in plot.points)]
    key = "".join(
        f"<li><b>{letter}</b> {escape(label)}, {escape(words.quantity(cost, plot.unit))}</li>"
        for letter, (cost, label) in zip(_LETTERS, groups, strict=False)
    )
    legend = _legend(shown, [series.index(name) for name in shown], shown)
    return f'{_drawing(parts, f"Accuracies against {plot.title}")}{legend}<ul class="key">{key}</ul>'


def lines(rows: Sequence[Mapping[str, float]], keys: Sequence[str], label: str) -> str:
    """The log of a training: shares in [0, 1] against the row number."""
    last = max(len(rows), 2)
    x, y = _linear(1, last, LEFT, W - RIGHT), _linear(0, 1, H - BOTTOM, TOP)
    parts = _frame(x, y, [t for t in _ticks(1, last) if t == int(t)], label, lambda v: f"{v:g}")
    for i, key in enumerate(keys):
        points = [(x(n + 1), y(row[key])) for n, row in enumerate(rows) if key in row]
        parts.append(f'<polyline class="line ink-{_colour(i)}" points="{_join(points)}"/>')
        parts += [_mark(*point, i, _colour(i), True, "") for point in points if len(points) <= 30]
    drawing = _drawing(parts, f"{', '.join(keys)} by {label}")
    return drawing + _legend(keys, range(len(keys)), [_colour(i) for i in range(len(keys))])


def heat_map(classes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> str:
    """Rows are true classes, columns predictions; each cell's ink is its share of the row."""
    n = len(classes)
    widest = max(len(_short(name)) for name in classes)
    left, top, side = 16 + 6.5 * widest, 24, 300
    cell = side / n
    numbers, every = n <= 12, max(1, math.ceil(n / 20))
    slanted = widest * 6.5 > side / n * every
    parts = [f'<rect class="track" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    for i, row in enumerate(counts):
        total = sum(row)
        for j, count in enumerate(row):
            if count == 0:
                continue
            share = count / total
            kind = "clean" if i == j else "robust"
            tip = f"{classes[i]} taken for {classes[j]}: {count} of {total}"
            ink, size = 0.12 + 0.88 * math.sqrt(share), max(cell - 1, 0.8)
            parts.append(
                f'<rect class="fill-{kind}" fill-opacity="{ink:.2f}" x="{left + j * cell:.1f}" '
                f'y="{top + i * cell:.1f}" width="{size:.1f}" height="{size:.1f}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if numbers:
                tone = "on" if share > 0.3 else "off"
                parts.append(
                    f'<text class="cell {tone}" x="{left + (j + 0.5) * cell:.1f}" y="{top + (i + 0.5) * cell + 4:.1f}" '
                    f'text-anchor="middle">{count}</text>'
                )
    for i in range(0, n, every):
        name = escape(_short(classes[i]))
        parts.append(
            f'<text class="small" x="{left - 5}" y="{top + (i + 0.5) * cell + 4:.1f}" text-anchor="end">{name}</text>'
        )
        at, under = left + (i + 0.5) * cell, top + side + 13
        turn = f'transform="rotate(-40 {at:.1f} {under})" text-anchor="end"' if slanted else 'text-anchor="middle"'
        parts.append(f'<text class="small" x="{at:.1f}" y="{under}" {turn}>{name}</text>')
    parts.append(f'<text class="strong" x="{left}" y="14">{escape(title)}</text>')
    right = sum(row[i] for i, row in enumerate(counts))
    height = top + side + (20 + 4.5 * widest if slanted else 20)
    label = f"{title}: {right} of {sum(map(sum, counts))} images right"
    return (
        f'<svg class="chart" viewBox="0 0 {left + side + 8:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
    )


def _frame(x: Scale, y: Scale, ticks: Sequence[float], label: str, show: Callable[[float], str]) -> list[str]:
    """Grid, the two axes and their words; the vertical axis is a share from 0 to 100 %."""
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{LEFT} {y(share):.1f}H{W - RIGHT}"/>')
        parts.append(f'<text class="small" x="{LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {H - BOTTOM}v4"/>')
        parts.append(
            f'<text class="small" x="{x(tick):.1f}" y="{H - BOTTOM + 17}" text-anchor="middle">{show(tick)}</text>'
        )
    middle = (LEFT + W - RIGHT) / 2
    parts.append(f'<text class="small" x="{middle:.0f}" y="{H - 6}" text-anchor="middle">{escape(label)}</text>')
    return parts


def _drawing(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {W} {H}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[str], shapes: Sequence[int], colours: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{_mark(7, 7, shape, colour, True, "")}</svg>'
        f"{escape(name)}</li>"
        for name, shape, colour in zip(names, shapes, colours, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def _mark(x: float, y: float, shape: int, colour: str, solid: bool, tip: str) -> str:
    """Circle, square, triangle or diamond, so that colour is not needed to tell them apart."""
    kind = f'class="mark {"solid" if solid else "hollow"} mark-{colour}"'
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if shape % 4 == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.5">{title}</circle>'
    if shape % 4 == 1:
        return f'<rect {kind} x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{title}</rect>'
    corners = [(0, -5.5), (5, 4), (-5, 4)] if shape % 4 == 2 else [(0, -6), (6, 0), (0, 6), (-6, 0)]
    return f'<polygon {kind} points="{_join([(x + dx, y + dy) for dx, dy in corners])}">{title}</polygon>'


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _divisor(values: Sequence[float], unit: str) -> tuple[float, str]:
    """Bytes are drawn in KiB or MiB."""
    if unit != "bytes" or max(values) < 1 << 10:
        return 1.0, unit
    return (float(1 << 20), "MiB") if max(values) >= 1 << 20 else (float(1 << 10), "KiB")


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between the two: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    inside = [2.0**p for p in powers if low <= 2.0**p <= high]
    return inside[:: max(1, math.ceil(len(inside) / 5))]


def _join(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _short(name: str) -> str:
    return name if len(name) <= 9 else f"{name[:8]}…"
