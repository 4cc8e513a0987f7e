"""Plots over time as SVG: axes with units, a line or bars for each series, and what a place means as its title."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Final

from replica.health.units import Quantity, quantity_text, step_for, time_text

WIDTH: Final = 560
HEIGHT: Final = 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 8, 10, 26  # room for the axes

_SPANS: Final = tuple(timedelta(hours=hours) for hours in (6, 24, 24 * 7, 24 * 30))
_TICKS: Final = {6: timedelta(hours=1), 24: timedelta(hours=4), 24 * 7: timedelta(days=1), 24 * 30: timedelta(days=5)}


@dataclass(frozen=True, slots=True)
class Span:
    """The time that a plot covers, cut into ``bins`` of equal length."""

    start: datetime
    end: datetime
    bins: int

    def bin_of(self, moment: datetime) -> int | None:
        """Return the bin that a moment lies in, None outside."""
        place = (moment - self.start) / (self.end - self.start) * self.bins
        return min(int(place), self.bins - 1) if 0 <= place <= self.bins else None

    def edge(self, number: int) -> datetime:
        """Return when a bin begins."""
        return self.start + (self.end - self.start) * number / self.bins


def span_for(times: Iterable[datetime], now: datetime, bins: int) -> Span:
    """Return the shortest span up to ``now`` that holds all times: 6 hours, a day, a week, or a month at the most."""
    oldest = min(times, default=now)
    length = next((span for span in _SPANS if now - oldest <= span), _SPANS[-1])
    return Span(now - length, now, bins)


@dataclass(frozen=True, slots=True)
class Series:
    """Values by bin, None where there is none. ``style`` is 1 or 2."""

    label: str
    values: tuple[float | None, ...]
    style: int = 1
    bars: bool = False


def binned(
    span: Span, values: Iterable[tuple[datetime, float]], join: Callable[[Sequence[float]], float]
) -> tuple[float | None, ...]:
    """Return the values of each bin joined to one."""
    held: list[list[float]] = [[] for _ in range(span.bins)]
    for moment, value in values:
        place = span.bin_of(moment)
        if place is not None:
            held[place].append(value)
    return tuple(join(found) if found else None for found in held)


def plot(
    title: str,
    quantity: Quantity,
    span: Span,
    series: Sequence[Series],
    *,
    limit: float | None = None,
    titles: bool = True,
) -> str:
    """Return a figure: SVG under its title. ``limit`` is drawn as a line across, where the values come near it.

    With ``titles`` a browser tells the values of the bin under the pointer.
    """
    known = [value for one in series for value in one.values if value is not None]
    top = max(known, default=0.0)
    if limit is not None and top >= limit / 4:
        top = max(top, limit)
    else:
        limit = None
    step = step_for(top or 1.0, quantity)
    ceiling = step * max(1, -(-top // step))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(title, quantity, series))}">',
        *_value_axis(ceiling, step, quantity),
        *_time_axis(span),
    ]
    if limit is not None:
        y = _y(limit, ceiling)
        parts.append(f'<path class="limit" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
    parts += [_bars(one, ceiling) if one.bars else _line(one, ceiling) for one in series]
    if titles:
        parts += _titles(span, series, quantity)
    parts.append("</svg>")
    legend = "".join(f'<span class="key s{one.style}">{escape(one.label)}</span>' for one in series)
    if limit is not None:
        legend += f'<span class="key limit">warning from {escape(quantity_text(limit, quantity))}</span>'
    return f"<figure><figcaption><b>{escape(title)}</b> {legend}</figcaption>{''.join(parts)}</figure>"


def _summary(title: str, quantity: Quantity, series: Sequence[Series]) -> str:
    told = []
    for one in series:
        known = [value for value in one.values if value is not None]
        if known:
            last, most = quantity_text(known[-1], quantity), quantity_text(max(known), quantity)
            told.append(f"{one.label}: last {last}, at most {most}")
    return f"{title}. {'; '.join(told) or 'nothing is known of this time'}."


def _x(place: float, bins: int) -> float:
    return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * place / bins, 1)


def _y(value: float, ceiling: float) -> float:
    return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * value / ceiling, 1)


def _value_axis(ceiling: float, step: float, quantity: Quantity) -> list[str]:
    parts = []
    lines, labels = [], []
    for number in range(round(ceiling / step) + 1):
        y = _y(number * step, ceiling)
        lines.append(f"M{_LEFT} {y}H{WIDTH - _RIGHT}")
        labels.append(
            f'<text class="v" x="{_LEFT - 6}" y="{y + 4}">{escape(quantity_text(number * step, quantity))}</text>'
        )
    parts.append(f'<path class="grid" d="{"".join(lines)}"/>')
    return parts + labels


def _time_axis(span: Span) -> list[str]:
    hours = round((span.end - span.start) / timedelta(hours=1))
    tick = _TICKS.get(hours, (span.end - span.start) / 6)
    origin = datetime(2000, 1, 1, tzinfo=UTC)
    moment = origin + -((origin - span.start) // tick) * tick
    labels = []
    while moment <= span.end:
        share = (moment - span.start) / (span.end - span.start)
        x = round(_LEFT + (WIDTH - _LEFT - _RIGHT) * share, 1)
        text = f"{moment:%H:%M}" if hours <= 24 else f"{moment:%d %b}"
        if 0.02 <= share <= 0.97:
            labels.append(f'<text class="t" x="{x}" y="{HEIGHT - 8}">{text}</text>')
        moment += tick
    return labels


def _line(one: Series, ceiling: float) -> str:
    bins = len(one.values)
    steps, dots, pen = [], [], "M"
    for number, value in enumerate(one.values):
        if value is not None:
            x, y = _x(number + 0.5, bins), _y(value, ceiling)
            steps.append(f"{pen}{x} {y}")
            dots.append(f"M{x} {y}h0")
            pen = "L"
    return (
        f'<path class="line s{one.style}" d="{"".join(steps)}"/><path class="dots s{one.style}" d="{"".join(dots)}"/>'
    )


def _bars(one: Series, ceiling: float) -> str:
    bins, floor = len(one.values), _y(0, ceiling)
    width = round((WIDTH - _LEFT - _RIGHT) / bins * 0.8, 1)
    drawn = []
    for number, value in enumerate(one.values):
        if value:
            y = min(_y(value, ceiling), floor - 1)  # what is not nothing is seen
            drawn.append(f"M{_x(number + 0.1, bins)} {floor}V{y}h{width}V{floor}z")
    return f'<path class="bar s{one.style}" d="{"".join(drawn)}"/>'


def _titles(span: Span, series: Sequence[Series], quantity: Quantity) -> list[str]:
    """Return an unseen rectangle over each bin that holds anything, whose title a browser shows under the pointer."""
    parts = []
    width = round((WIDTH - _LEFT - _RIGHT) / span.bins, 1)
    for number in range(span.bins):
        told = [
            f"{one.label}: {quantity_text(value, quantity)}"
            for one in series
            if (value := one.values[number]) is not None
        ]
        if told:
            text = escape(f"{time_text(span.edge(number))} UTC\n" + "\n".join(told))
            parts.append(
                f'<rect class="hit" x="{_x(number, span.bins)}" y="{_TOP}" width="{width}" '
                f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{text}</title></rect>'
            )
    return parts
