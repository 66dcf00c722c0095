"""The report's page: figures -> pictures and words -> one HTML file that needs nothing else.

charts.py has the geometry, corpus_page.py what is shown of a corpus, templates/ the words, the style and the script.
"""

from typing import Any

from babel import Locale
from jinja2 import Environment, PackageLoader, StrictUndefined

from f2llm.evaluate import charts
from f2llm.evaluate.charts import Dot, Series
from f2llm.evaluate.corpus_page import corpus_view, share

BASELINES = {
    "tfidf": "TF-IDF, English",
    "tfidf_nearest": "TF-IDF, nearest",
    "lookup": "exact look-up",
}
STRIP_LANGUAGES = 3  # scripts with fewer scored languages share one strip
COLOURS = 6  # in templates/style.css
LONGEST_FACT = 30
# Of a record of a training step, and what the page calls them.
TEACHERS_TERMS = {
    "teacher_mse": "squared distance to the teacher",
    "teacher_cosine": "1 - cosine with the teacher",
    "teacher_similarity": "divergence from the teacher's similarities",
    "teacher_ranking": "surprise at the teacher's ranking",
}
MOST_POINTS = 300  # of one line of losses; a long run logs far more than a picture can show

Figures = dict[str, Any]


def render(figures: Figures, logged: dict[str, list[Figures]], recipe: str) -> str:
    """The page, complete in itself; everything that is not our own text is escaped."""
    environment = Environment(
        loader=PackageLoader("f2llm.evaluate", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: "–" if value is None else charts.percent(value),
        "points": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        "count": lambda value: f"{value:,}",
        "short": short_count,
        "duration": duration,
        "scalars": scalars,
        "share": lambda value: share(value, 1),
    }
    pictures: dict[str, Any] = {"losses": loss_panels(logged)}
    if figures["models"]:
        pictures |= score_pictures(figures)
    return environment.get_template("report.html").render(
        figures,
        baselines=BASELINES,
        by_tag={row["language"]: row for row in figures.get("per_language", [])},
        pictures=pictures,
        recipe=recipe,
        view=corpus_view(figures["corpus"]) if figures["corpus"] else None,
        script_names=script_names(),
    )


def short_count(value: int) -> str:
    """5700000 -> 5.7M; three significant figures at most."""
    for unit, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}" if value < 1000 * unit else f"{value / unit:,.0f}{letter}"
    return str(value)


def duration(seconds: float) -> str:
    """432 -> 7 min 12 s, in one piece."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        text = f"{hours} h {minutes} min"
    elif minutes:
        text = f"{minutes} min {rest} s"
    else:
        text = f"{seconds:.1f} s" if seconds < 9.95 else f"{rest} s"
    return text.replace(" ", charts.NO_BREAK)


def scalars(facts: Figures, most: int = 4) -> list[tuple[str, str]]:
    """The first few plain facts of a stage as (label, value), without hashes and other long texts."""
    plain = [
        (key.replace("_", " "), plain_number(value))
        for key, value in facts.items()
        if isinstance(value, int | float | str) and len(str(value)) <= LONGEST_FACT
    ]
    return plain[:most]


def plain_number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    )


def script_names() -> dict[str, str]:
    """ISO 15924 code -> English name, as it may stand alone."""
    return {**Locale.parse("en").scripts, "Hans": "Simplified Han", "Hant": "Traditional Han"}


def model_colours(figures: Figures) -> dict[str, int]:
    return {model["name"]: i % COLOURS for i, model in enumerate(figures["models"])}


def score_pictures(figures: Figures) -> dict[str, Any]:
    """All pictures of scores, each in the widths in which it is shown."""
    widths = (charts.WIDE, charts.NARROW)
    sizes = sorted({int(size) for model in figures["models"] for size in model["accuracy_at_1"]})
    dots = [
        (Dot(row["language"], f"{row['name']} ({row['language']})", row["accuracy_at_1"]), row)
        for row in figures["per_language"]
    ]
    pictures: dict[str, Any] = {
        "colours": model_colours(figures),
        "sizes": sizes,
        "curves": [charts.curves(curve_series(figures, sizes), sizes, width) for width in widths],
        "strips": [
            charts.strips(strip_rows(figures, [d for d, _ in dots]), strip_labels(figures), w) for w in widths
        ],
        "dumbbells": [
            [
                charts.dumbbells([(int(s), p["without"], p["with"]) for s, p in pair["sizes"].items()], w)
                for w in widths
            ]
            for pair in figures["distillation"]
        ],
    }
    if "tfidf_nearest" in figures["baseline"]:
        pictures["scatter"] = charts.scatter(
            [(dot, row["tfidf_nearest"], 0 if row["script"] == "Latn" else 1) for dot, row in dots]
        )
        pictures["above"] = sum(row["accuracy_at_1"] > row["tfidf_nearest"] for _, row in dots)
    return pictures


def curve_series(figures: Figures, sizes: list[int]) -> list[Series]:
    colours = model_colours(figures)
    series = [
        Series(
            model["name"],
            [(int(size), spread["mean"]) for size, spread in model["accuracy_at_1"].items()],
            colours[model["name"]],
        )
        for model in figures["models"]
    ]
    return series + [
        Series(
            BASELINES[name],
            [(sizes[0], b["full"]["mean"]), (sizes[-1], b["full"]["mean"])],
            "grey",
            dashed=True,
        )
        for name, b in figures["baseline"].items()
    ]


def strip_labels(figures: Figures) -> dict[str, str]:
    return {"accuracy_at_1": figures["largest"]} | {name: BASELINES[name] for name in figures["baseline"]}


def strip_rows(figures: Figures, dots: list[Dot]) -> list[tuple[str, list[Dot], dict[str, float]]]:
    """Scripts with enough languages by their number of languages, then one strip for all the others."""
    names = script_names()
    shown = [k for k in strip_labels(figures) if k != "lookup"]
    rows, others = [], []
    by_tag = {row["language"]: row for row in figures["per_language"]}
    for code, script_figures in figures["scripts"].items():
        of_script = [dot for dot in dots if by_tag[dot.tag]["script"] == code]
        if script_figures["languages"] >= STRIP_LANGUAGES:
            rows.append((names.get(code, code), of_script, {key: script_figures[key] for key in shown}))
        else:
            others += of_script
    if others:
        means = {key: sum(by_tag[dot.tag][key] for dot in others) / len(others) for key in shown}
        rows.append(("Other scripts", others, means))
    return rows


def loss_panels(logged: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """Per training stage: the loss of each source's batches and, where there is a teacher, the distance to it."""
    sources = dict.fromkeys(r["source"] for records in logged.values() for r in records if "source" in r)
    colours = {source: i % COLOURS for i, source in enumerate(sources)}
    panels = []
    for stage, records in logged.items():
        for term, title in (("loss", "loss"), *TEACHERS_TERMS.items()):
            by_source: dict[str, list[tuple[float, float]]] = {}
            for record in records:
                if "source" in record and term in record:  # a step, not a validation or an alarm
                    by_source.setdefault(record["source"], []).append((record["step"], record[term]))
            series = [
                Series(name, by_source[name][:: 1 + len(by_source[name]) // MOST_POINTS], colours[name])
                for name in sources
                if name in by_source
            ]
            if series:
                panels.append(
                    {"stage": stage, "title": title, "series": series, "chart": charts.losses(series)}
                )
    return panels
