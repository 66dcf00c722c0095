"""The geometry of the pictures: what must hold of any of them, and a few places worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from f2llm.evaluate import charts
from f2llm.evaluate.charts import Dot, Series


def test_linear_takes_ends_to_ends() -> None:
    place = charts.linear(0.0, 0.5, 300, 100)
    assert (place(0.0), place(0.5), place(0.25)) == (300, 100, 200)


@pytest.mark.parametrize(
    ("high", "ticks"),
    [
        (0.71, [0, 0.2, 0.4, 0.6, 0.8]),
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (9.3, [0, 2, 4, 6, 8, 10]),
        (400, [0, 100, 200, 300, 400]),
    ],
)
def test_nice_ticks(high: float, ticks: list[float]) -> None:
    assert charts.nice_ticks(high) == pytest.approx(ticks)


def test_labels_are_moved_apart_and_no_further() -> None:
    assert charts.apart([10, 50, 90], 12, 0, 100) == [10, 50, 90]
    assert charts.apart([50, 52, 20], 12, 0, 100) == [50, 62, 20]
    assert charts.apart([99, 98, 100], 12, 0, 100) == [88, 76, 100]
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = rng.uniform(0, 100, size=6).tolist()
        moved = charts.apart(places, 12, 0, 100)
        in_order = [moved[i] for i in np.argsort(places)]
        assert all(b - a >= 11.9 for a, b in itertools.pairwise(in_order))
        assert in_order[0] >= 0 and in_order[-1] <= 100


def test_tick_labels_that_would_touch_are_dropped_but_for_the_last() -> None:
    ticks = [(0.0, "8"), (30.0, "16"), (60.0, "128"), (75.0, "192"), (90.0, "256")]
    assert [label for _, label in charts.thin_out(ticks, 26)] == ["8", "16", "128", "256"]


def test_swarm_keeps_dots_from_covering_each_other() -> None:
    rng = np.random.default_rng(1)
    places = np.round(rng.normal(200, 30, size=150), 0).tolist()
    offsets = charts.swarm(places, 7.6)
    dots = list(zip(places, offsets, strict=True))
    assert min(math.dist(a, b) for a, b in itertools.combinations(dots, 2)) >= 7.6 - 1e-6
    assert charts.swarm([10, 30, 50], 7.6) == [0, 0, 0]  # nobody moves without need


def test_running_mean_keeps_straight_lines_straight() -> None:
    line = [(float(step), 3.0 - 0.01 * step) for step in range(100)]
    assert np.array(charts.running_mean(line)) == pytest.approx(np.array(line))
    noisy = [(float(step), float((-1) ** step)) for step in range(100)]
    assert max(abs(value) for _, value in charts.running_mean(noisy)[4:-4]) < 0.2


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_curves_fall_where_accuracy_falls(width: int) -> None:
    falling = Series("a model with a very long name indeed", [(8, 0.4), (64, 0.6), (256, 0.7)], 0)
    flat = Series("baseline", [(8, 0.3), (256, 0.3)], "grey", dashed=True)
    chart = charts.curves([falling, flat], [8, 64, 256], width)
    (x8, y8, _), (x64, y64, title), (x256, y256, _) = chart["lines"][0]["dots"]
    assert chart["left"] < x8 < x64 < x256 < chart["right"]
    assert 0 < y256 < y64 < y8 < chart["bottom"]
    assert (x64 - x8) / (x256 - x8) == pytest.approx(3 / 5, abs=0.01)  # log2: 3, 6, 8
    assert title.startswith("a model with a very long name indeed, 64 dimensions: 60.0")
    assert len(chart["lines"][0]["label"]) <= 24
    assert chart["lines"][1]["dots"] == []


def test_strips_put_labels_right_to_left_downwards() -> None:
    dots = [Dot("deu", "German", 0.7), Dot("fra", "French", 0.7)]
    means = {"ours": 0.7, "theirs": 0.4, "weakest": 0.1}
    chart = charts.strips([("Latin", dots, means)], {key: key for key in means}, charts.WIDE)
    assert [key["key"] for key in chart["keys"]] == ["ours", "theirs", "weakest"]
    assert [key["y"] for key in chart["keys"]] == sorted(key["y"] for key in chart["keys"])
    (row,) = chart["rows"]
    (x0, y0, *_), (x1, y1, *_) = row["dots"]
    assert x0 == x1 and abs(y0 - y1) > 2 * chart["radius"]
    assert all(row["top"] <= y <= row["bottom"] for y in (y0, y1))


def test_dumbbells_show_signed_gains() -> None:
    chart = charts.dumbbells([(8, 0.40, 0.45), (64, 0.61, 0.60)], charts.WIDE)
    assert [row["gain"] for row in chart["rows"]] == ["+5.0", "−1.0"]
    assert chart["rows"][0]["without"] < chart["rows"][0]["with"]
    assert chart["rows"][1]["without"] > chart["rows"][1]["with"]
    assert (chart["without_label"], chart["with_label"]) == ((6, "end"), (-6, "start"))
    turned = charts.dumbbells([(8, 0.45, 0.40)], charts.WIDE)
    assert (turned["without_label"], turned["with_label"]) == ((-6, "start"), (6, "end"))


def test_losses_of_one_step_can_be_drawn() -> None:
    chart = charts.losses([Series("cldr-names", [(0, 3.2)], 0)])
    x, y = map(float, chart["lines"][0]["path"].removeprefix("M").removesuffix("h0").split())
    assert x == chart["left"]
    assert chart["y_ticks"][-1][0] < y < chart["bottom"]
    assert [label for _, label in chart["x_ticks"]] == ["0", "1"]
