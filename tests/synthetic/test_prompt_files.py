"""Prompts as files: ours are whole, a user's take their place, and slips in them are named."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from f2llm.errors import UsageError
from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.generate import Author, Topic
from f2llm.synthetic.kinds import KINDS, Kind, LabelTask, Task
from f2llm.synthetic.preview import preview
from f2llm.synthetic.prompt_files import PLACEHOLDERS, language_with_codes, load_prompts

CONFIG = SyntheticStage(
    stage="synthetic", model="m", url="http://localhost/v1", languages=["zho_Hant", "srp"]
)
TASK = LabelTask(task="Sort {letters}.", name="wish", labels=["a {language} b", "c"])


def author(folder: Path | None = None) -> Author:
    return Author(CONFIG, load_prompts(folder))


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_our_prompts_say_all_that_an_answer_depends_on(kind: Kind) -> None:
    topic, ours = Topic(kind.name, "zho_Hant"), author()
    asked = ours.tasks_request(topic, 1, [Task(task=f"Known task {number}.") for number in range(3)]).text
    assert "Chinese (ISO 639-3: zho, script: Hant)" in asked and "- Known task 2." in asked
    row = ours.row_request(topic, TASK if kind.has_labels else Task(task="Do {this}."), 6)
    text = row.request.text
    assert "Chinese (ISO 639-3: zho, script: Hant)" in text and "example number 7" in text
    # Braces of the model's own are left alone; beside these, nothing is left to fill in.
    left = set(re.findall(r"\{\w+\}", text + asked))
    assert left == ({"{letters}", "{language}"} if kind.has_labels else {"{this}"})
    for field in row.request.form.model_fields:
        assert f'"{field}": "..."' in text
    if kind.has_labels:
        assert row.label == "a {language} b" and f"copied letter by letter: {row.label}" in text
    if kind.name == "bitext":
        assert "English (ISO 639-3: eng, script: Latn)" in text


def test_what_is_drawn_depends_on_the_seed_and_on_what_it_is_for() -> None:
    prompt = load_prompts()["rows-retrieval"]
    values = dict.fromkeys(PLACEHOLDERS["rows-retrieval"], "x")

    def texts(seed: int) -> list[str]:
        return [prompt.fill(values, seed, "short-long", "deu", number) for number in range(200)]

    assert texts(0) == texts(0) != texts(1)
    options = prompt.choices["manner"]
    counts = [sum(option in text for text in texts(0)) for option in options]
    assert sum(counts) == 200 and min(counts) > 25  # of 50 that each would have on the average


def test_a_users_prompt_takes_the_place_of_ours_and_has_an_id_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows-paraphrase.md"
    path.write_text("---\ncolour: [rot]\n---\nPlace: {task}, {colour}, {language_name}, no {braces here}\n")
    ours, theirs = load_prompts(), load_prompts(tmp_path)
    assert {name for name in ours if ours[name] != theirs[name]} == {"rows-paraphrase"}
    row = author(tmp_path).row_request(Topic("paraphrase", "srp"), Task(task="A market."), 0)
    assert row.request.text == "Place: A market., rot, Serbian, no {braces here}\n"
    path.write_text(path.read_text() + "\n")
    again = author(tmp_path).row_request(Topic("paraphrase", "srp"), Task(task="A market."), 0)
    assert again.request.text == row.request.text and again.request.id != row.request.id
    assert again.request.prompt_id != row.request.prompt_id == theirs["rows-paraphrase"].id


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "rows-paraphrase.md",
            "{taks}",
            r"rows-paraphrase\.md uses \{taks\}: the nearest valid placeholder is 'task'",
        ),
        ("rows-paraphrase.md", "---\na: b\n---\n{a}", "expected lists of texts, each under a name"),
        ("rows-paraphrase.md", "---\na: [b\n---\n{a}", "is not YAML"),
        ("rows-paraphrases.md", "{task}", r"is no prompt: the nearest valid name is 'rows-paraphrase'"),
        ("readme.txt", "", "has no prompt; put files such as rows-retrieval.md there"),
    ],
)
def test_slips_in_a_users_prompts(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_prompts(tmp_path)


def test_languages_by_name_and_codes() -> None:
    assert language_with_codes("srp") == "Serbian (ISO 639-3: srp, script: Cyrl)"
    assert language_with_codes("srp_Latn") == "Serbian (ISO 639-3: srp, script: Latn)"


def test_requests_are_told_apart_by_all_that_they_depend_on() -> None:
    ids = set()
    changes: list[dict[str, object]] = [{}, {"model": "n"}, {"seed": 1}, {"temperature": 0.5}]
    for change in changes:
        for topic in (Topic("short-long", "srp"), Topic("short-long", "zho_Hant"), Topic("long-long", "srp")):
            for task in (Task(task="A."), Task(task="B.")):
                one = Author(CONFIG.model_copy(update=change), load_prompts())
                ids |= {one.row_request(topic, task, number).request.id for number in range(3)}
    assert len(ids) == 4 * 3 * 2 * 3


def test_a_preview_counts_and_shows() -> None:
    config = CONFIG.model_copy(
        update={"kinds": ["bitext", "clustering"], "other_language": "srp", "tasks": 30, "rows": 5}
    )
    seen = preview(config.model_copy(update={"price_in": 1e6}))
    assert (seen.requests_for_tasks, seen.requests_for_rows) == (3 * 2, 3 * 30 * 5)  # 20 tasks in one request
    assert seen.money == pytest.approx(seen.tokens_in, abs=1)
    assert len(seen.prompts) == 4 and all(prompt in str(seen) for prompt in seen.prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ["de"]}, "'de' is written 'deu'"),
        ({"languages": ["deu", "deu"]}, "'languages' has a value twice"),
        ({"budget_money": 5.0}, "'budget_money' needs 'price_in' and 'price_out'"),
        ({"url": "https://user:secret@host/v1"}, "should match pattern"),  # a key would end up in files
        ({"url": "host/v1"}, "should match pattern"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SyntheticStage(**{"stage": "synthetic", "model": "m", "languages": ["eng"], **change})  # type: ignore[arg-type]
