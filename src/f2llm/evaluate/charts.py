"""Figures to places: the geometry of the report's pictures, in SVG units, for one width at a time.

Every function takes numbers and a width and gives a plain dict of coordinates and texts, for templates/charts.html
to draw. A page carries most pictures twice, wide and narrow, so that text keeps its size on a telephone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Chart = dict[str, Any]

WIDE, NARROW = 820, 360
LINE_HEIGHT = 15.0
NO_BREAK = "\N{NO-BREAK SPACE}"  # between a figure and its unit


class Series(NamedTuple):
    """One line: its label, its points (x ascending) and its colour, an index into the page's palette or "grey"."""

    label: str
    points: list[tuple[float, float]]
    colour: int | str
    dashed: bool = False


class Dot(NamedTuple):
    """One language: its tag, what a reader sees of it, and its accuracy."""

    tag: str
    title: str
    value: float


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{NO_BREAK}%"


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map that takes low to start and high to end."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def nice_ticks(high: float, most: int = 5) -> list[float]:
    """At most about `most` steps of 1, 2 or 5 times a power of ten from 0 up to at least `high` (> 0)."""
    rough = high / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(high / step - 1e-9) + 1)]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to `places`, in their order, at least `gap` from each other, in [low, high]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [0.0] * len(places)
    previous = low - gap
    for i in order:
        previous = moved[i] = max(places[i], previous + gap)
    following = high + gap
    for i in reversed(order):
        following = moved[i] = min(moved[i], following - gap)
    return [round(place, 1) for place in moved]


def thin_out(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Without the labels that stand less than `gap` left of the next one that is kept."""
    kept: list[tuple[float, str]] = []
    for place, label in reversed(ticks):
        if not kept or kept[0][0] - place >= gap:
            kept.insert(0, (place, label))
    return kept


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a line through the points; one point alone is a line of no length, drawn as a round dot."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) + ("h0" if len(points) == 1 else "")


def curves(series: Sequence[Series], sizes: Sequence[int], width: int) -> Chart:
    """Accuracy against embedding size on a logarithmic axis; labels at the right end of the lines."""
    narrow = width <= NARROW
    height = 330 if narrow else 400
    left, right, top, bottom = 40, width - (112 if narrow else 196), 14, height - 44
    ticks = nice_ticks(max(y for line in series for _, y in line.points) or 1.0)
    x = linear(math.log2(sizes[0]), math.log2(sizes[-1]), left + 12, right - 6)
    y = linear(0, ticks[-1], bottom, top)
    ends = [y(line.points[-1][1]) for line in series]
    lines = [
        {
            "label": shorten(line.label, 15 if narrow else 24),
            "title": line.label,
            "value": percent(line.points[-1][1]),
            "colour": line.colour,
            "dashed": line.dashed,
            "end": (x(math.log2(line.points[-1][0])), end),
            "label_y": label_y,
            "path": path([(x(math.log2(size)), y(value)) for size, value in line.points]),
            "dots": [
                (x(math.log2(size)), y(value), f"{line.label}, {size} dimensions: {percent(value)}")
                for size, value in line.points
                if line.colour != "grey"
            ],
        }
        for line, end, label_y in zip(
            series, ends, apart(ends, (2 if narrow else 1.25) * LINE_HEIGHT, top, bottom), strict=True
        )
    ]
    return {
        "width": width,
        "height": height,
        "narrow": narrow,
        "left": left,
        "right": right,
        "bottom": bottom,
        "x_ticks": thin_out([(x(math.log2(size)), str(size)) for size in sizes], 26),
        "y_ticks": [(y(tick), percent(tick, 0)) for tick in ticks],
        "lines": lines,
    }


def losses(series: Sequence[Series], width: int = NARROW) -> Chart:
    """Loss against step for one training stage: the logged values faintly, their running mean on top."""
    height, left, right, top, bottom = 210, 38, width - 8, 10, 182
    last = max(line.points[-1][0] for line in series) or 1
    ticks = nice_ticks(max(value for line in series for _, value in line.points) or 1.0, 4)
    x_ticks = [tick for tick in nice_ticks(last, 4) if tick <= last and tick.is_integer()]
    x, y = linear(0, last, left, right), linear(0, ticks[-1], bottom, top)
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "bottom": bottom,
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks],
        "lines": [
            {
                "colour": line.colour,
                "raw": path([(x(step), y(value)) for step, value in line.points]),
                "path": path([(x(step), y(value)) for step, value in running_mean(line.points)]),
            }
            for line in series
        ],
    }


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with its neighbours, a twelfth of the line in all; the ends with those that there are."""
    reach = max(1, len(points) // 24)
    means = []
    for i, (step, _) in enumerate(points):
        reach_here = min(reach, i, len(points) - 1 - i)
        window = points[i - reach_here : i + reach_here + 1]
        means.append((step, sum(value for _, value in window) / len(window)))
    return means


def strips(
    rows: Sequence[tuple[str, list[Dot], dict[str, float]]], names: dict[str, str], width: int
) -> Chart:
    """One strip per script: a dot for each language's accuracy, a tick for each mean.

    `rows` (at least one) are (script, dots, means by key); `names`, the labels of the keys, stand over the first.
    """
    narrow = width <= NARROW
    left, right = (96 if narrow else 176), width - 16
    radius = 2.6 if narrow else 3.6
    x = linear(0, 1, left, right)
    y = 22.0 + max(len(means) for _, _, means in rows) * LINE_HEIGHT
    strips_drawn: list[Chart] = []
    for label, dots, means in rows:
        places = swarm([x(dot.value) for dot in dots], 2 * radius + 0.4)
        reach = max(6.0, *(abs(place) + radius for place in places))
        middle = y + reach + 8
        strips_drawn.append(
            {
                "label": shorten(label, 13 if narrow else 24),
                "count": len(dots),
                "y": round(middle, 1),
                "top": round(y + 4, 1),
                "bottom": round(middle + reach + 4, 1),
                "dots": [
                    (x(dot.value), round(middle + place, 1), dot.tag, f"{dot.title}: {percent(dot.value)}")
                    for dot, place in zip(dots, places, strict=True)
                ],
                "means": [(x(value), key, f"{names[key]}: {percent(value)}") for key, value in means.items()],
            }
        )
        y = middle + reach + 8
    # A label ends at its line, and the rightmost stands highest: so no line runs through a label.
    keys = sorted(strips_drawn[0]["means"], reverse=True)
    return {
        "width": width,
        "height": round(y + 46),
        "left": left,
        "right": right,
        "bottom": round(y + 4, 1),
        "radius": radius,
        "rows": strips_drawn,
        "keys": [
            {
                "x": place,
                "y": 12 + i * LINE_HEIGHT,
                "key": key,
                "label": names[key],
                "foot": strips_drawn[0]["top"],
            }
            for i, (place, key, _) in enumerate(keys)
        ],
        "x_ticks": [(x(tick / 5), percent(tick / 5, 0)) for tick in range(6)],
    }


def swarm(places: Sequence[float], gap: float) -> list[float]:
    """Offsets across the line that keep dots at these `places` along it at least `gap` from each other."""
    placed: list[tuple[float, float]] = []
    offsets = [0.0] * len(places)
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        near = [(p, o) for p, o in placed if places[i] - p < gap]
        steps = (sign * step * gap / 4 for step in range(4 * len(places) + 1) for sign in (1, -1))
        offsets[i] = next(
            o for o in steps if all(math.hypot(places[i] - p, o - q) >= gap - 1e-6 for p, q in near)
        )
        placed.append((places[i], offsets[i]))
    return offsets


def scatter(dots: Sequence[tuple[Dot, float, int | str]], width: int = NARROW) -> Chart:
    """Each language's accuracy against the baseline's, on equal axes; above the diagonal the model is better."""
    height, left, right, top, bottom = width, 44, width - 10, 10, width - 44
    x, y = linear(0, 1, left, right), linear(0, 1, bottom, top)
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "x_ticks": [(x(tick / 5), percent(tick / 5, 0)) for tick in range(6)],
        "y_ticks": [(y(tick / 5), percent(tick / 5, 0)) for tick in range(6)],
        "dots": [
            (
                x(other),
                y(dot.value),
                dot.tag,
                f"{dot.title}: {percent(dot.value)}, baseline {percent(other)}",
                colour,
            )
            for dot, other, colour in dots
        ],
    }


def dumbbells(rows: Sequence[tuple[int, float, float]], width: int) -> Chart:
    """One row per embedding size: accuracy without (open dot) and with a teacher (full dot), and what it gains."""
    narrow = width <= NARROW
    left, right, row_height, top = 44, width - (52 if narrow else 100), 34, 40
    values = [value for _, *pair in rows for value in pair]
    gains_first = rows[0][2] >= rows[0][1]
    step = 0.05 if max(values) - min(values) < 0.3 else 0.1
    low = math.floor(min(values) / step) * step
    high = max(low + step, math.ceil(max(values) / step) * step)
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    x = linear(low, high, left + 14, right - 14)
    height = top + row_height * len(rows) + 40
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "top": top,
        "bottom": height - 40,
        "x_ticks": [(x(tick), percent(tick, 0)) for tick in ticks[:: 2 if narrow and len(ticks) > 5 else 1]],
        # The labels of the first row stand outside its two dots: (offset, anchor).
        "without_label": (6, "end") if gains_first else (-6, "start"),
        "with_label": (-6, "start") if gains_first else (6, "end"),
        "rows": [
            {
                "size": size,
                "y": top + row_height * (i + 0.5),
                "without": x(without),
                "with": x(with_teacher),
                "title": f"{size} dimensions: {percent(without)} alone, {percent(with_teacher)} with a teacher",
                "gain": f"{100 * (with_teacher - without):+.1f}".replace("-", "−"),
            }
            for i, (size, without, with_teacher) in enumerate(rows)
        ],
    }
