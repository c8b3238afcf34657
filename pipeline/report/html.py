"""A view as one self-contained HTML page: inline SVG and styles, no script, nothing fetched."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline import __version__
from pipeline.report import charts
from pipeline.report.figures import CurvePoint, Shares
from pipeline.report.rows import Bar, Scatter, View
from pipeline.report.view import SERIES


def render(view: View) -> str:
    """The page as text. Equal views give equal pages; whatever the view holds is escaped."""
    style = _environment().get_template("style.css.j2").render()
    page = _environment().get_template("report.html.j2")
    return page.render(
        view=view,
        style=Markup(style),  # our own file, without anything of the view in it
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=__version__,
        training=_training(view.training),
        bar=_bar,
        shares=_shares,
        scatter=_scatter,
        curve=_curve,
        heat_map=_heat_map,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment


def _code(text: str) -> Markup:
    """Escaped text in which what stood between backquotes is set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


# Markup is safe here because `charts` escapes every word it is given.
def _bar(bar: Bar) -> Markup:
    return Markup(charts.margin_bar(bar))


def _shares(shares: Shares) -> Markup:
    return Markup(charts.shares_bar(shares))


def _scatter(plot: Scatter) -> Markup:
    return Markup(charts.scatter(plot, SERIES))


def _curve(points: Sequence[CurvePoint], eps: float | None) -> Markup:
    return Markup(charts.curve(points, eps))


def _heat_map(classes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Markup:
    return Markup(charts.heat_map(classes, counts, title))


def _training(rows: Sequence[Mapping[str, object]]) -> Markup | None:
    """The columns of the log that are shares, drawn; None where there are none, or one row only."""
    numbers = [{k: float(v) for k, v in row.items() if isinstance(v, int | float)} for row in rows]
    keys = [key for key in dict.fromkeys(key for row in numbers for key in row) if "accuracy" in key]
    shares = [key for key in keys if all(0 <= row.get(key, 0.0) <= 1 for row in numbers)]
    return Markup(charts.lines(numbers, shares, "epoch")) if shares and len(rows) > 1 else None
