"""The stage against a server that misbehaves: what is asked, paid for, kept, and left after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.synthetic.chat_server import KEY, Chat, serving_chat

from f2llm.data.rows import read_rows
from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.checks import check_languages
from f2llm.synthetic.preview import preview
from f2llm.synthetic.stage import synthetic_stage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setenv("TEST_API_KEY", KEY)
    with serving_chat() as chat:
        yield chat


def settings(chat: Chat, **changes: Any) -> SyntheticStage:
    base: dict[str, Any] = {
        "stage": "synthetic",
        "model": "Org/Tester 1",
        "url": chat.address,
        "api_key_env": "TEST_API_KEY",
        "languages": ["deu", "eng"],
        "tasks": 3,
        "rows": 4,
        "concurrency": 4,
        "timeout": 30.0,
        "retry_pause": 0.01,
        "language_sure": None,
        "price_in": 1.0,
        "price_out": 5.0,
    }
    return SyntheticStage(**base | changes)


def is_for_row(prompt: str) -> bool:
    return "Think up" not in prompt


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_rows(out)[0].to_pylist()
    return rows


def total(counts: dict[str, dict[str, int]]) -> int:
    return sum(sum(reasons.values()) for reasons in counts.values())


def test_every_kind_becomes_rows_that_say_where_they_are_from(chat: Chat, tmp_path: Path) -> None:
    config = settings(chat, licence="Apache-2.0")
    facts = synthetic_stage(config, tmp_path)
    table, sources = read_rows(tmp_path)
    rows = table.to_pylist()
    assert {source.name: (source.format, source.rows) for source in sources} == {
        "synthetic/org-tester-1/short-long": ("retrieval", 24),
        "synthetic/org-tester-1/long-short": ("retrieval", 24),
        "synthetic/org-tester-1/short-short": ("retrieval", 24),
        "synthetic/org-tester-1/long-long": ("retrieval", 24),
        "synthetic/org-tester-1/paraphrase": ("retrieval", 24),
        "synthetic/org-tester-1/bitext": ("retrieval", 12),  # English is not translated into itself
        "synthetic/org-tester-1/classification": ("classification", 24),
        "synthetic/org-tester-1/clustering": ("clustering", 24),
    }
    assert facts["rows"] == {source.name: source.rows for source in sources}
    assert {(row["query_lang"], row["positive_lang"]) for row in rows if row["task"] == "bitext mining"} == {
        ("deu", "eng")
    }
    assert {row["licence"] for row in rows} == {"Apache-2.0"}
    labelled = [row for row in rows if row["task"] == "classification"]
    assert all(re.fullmatch(r"\w{8} \d: (red|green|blue \{known\})", row["label"]) for row in labelled)
    assert Counter(row["label"].partition(": ")[2] for row in labelled)["green"] == 6  # each label in turn
    assert all(row["negatives"][0] != row["label"] for row in labelled)
    assert all(row["negatives"][0].partition(": ")[0] == row["label"].partition(": ")[0] for row in labelled)

    asked = preview(config)
    assert asked.requests_for_rows == len(rows)
    assert asked.requests_for_tasks + asked.requests_for_rows == len(chat.seen) == facts["requests"]
    made = pq.read_table(tmp_path / "provenance.parquet").to_pylist()
    assert [one["hash"] for one in made] == [row["hash"] for row in rows]
    assert {one["model"] for one in made} == {"Org/Tester 1"} and {one["answered_by"] for one in made} == {
        "tester-1"
    }
    prompts = {one["prompt"].partition("@")[0] for one in made}
    assert prompts == {"rows-retrieval", "rows-labels", "rows-paraphrase", "rows-bitext"}
    by_request = {one["request"] for one in made}
    assert len(by_request) == len(rows)


def test_a_server_that_misbehaves_changes_no_row(chat: Chat, tmp_path: Path) -> None:
    chat.retry_after = "0.05"
    config = settings(chat, timeout=0.4, kinds=["short-long", "classification"], tasks=2)
    synthetic_stage(config, tmp_path / "good")
    good = Counter(chat.answered)
    chat.seen.clear()
    chat.answered.clear()
    deeds = ["429", "500", "502", "503", "not json", "wrong schema", "closed", "slow", "drip"]
    tried: Counter[str] = Counter()

    def misdeeds(number: int, prompt: str) -> str:
        tried[prompt] += 1
        return deeds[number % len(deeds)] if tried[prompt] == 1 else "fences"

    chat.misdeeds = misdeeds
    facts = synthetic_stage(config, tmp_path / "bad")
    assert rows_of(tmp_path / "bad") == rows_of(tmp_path / "good")
    assert Counter(chat.answered) == good and set(good.values()) == {1}
    assert facts["requests"] == len(chat.seen) == 2 * sum(good.values())
    names = {"closed": "connection broken", "slow": "timeout", "drip": "timeout", "not json": "not JSON"}
    first = [deeds[number % len(deeds)] for number in _firsts(chat)]
    assert set(first) == set(deeds)
    assert facts["faults"] == Counter(names.get(deed, deed) for deed in first)
    assert facts["unanswered"] == {}


def _firsts(chat: Chat) -> list[int]:
    """Numbers of the requests that were the first with their prompt."""
    met: set[str] = set()
    return [n for n, seen in enumerate(chat.seen) if seen.prompt not in met and not met.add(seen.prompt)]  # type: ignore[func-returns-value]


def test_pauses_double_and_retry_after_binds_everybody(chat: Chat, tmp_path: Path) -> None:
    chat.misdeeds = lambda number, prompt: "503" if number < 3 else ""
    synthetic_stage(settings(chat, retry_pause=0.1, kinds=["bitext"], tasks=1, rows=1), tmp_path / "doubled")
    times = [seen.at for seen in chat.seen[:4]]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert all(pause >= at_least for pause, at_least in zip(pauses, (0.05, 0.1, 0.2), strict=True))

    chat.seen.clear()
    chat.misdeeds, chat.retry_after = lambda number, prompt: "429" if number == 5 else "", "0.4"
    synthetic_stage(settings(chat, kinds=["paraphrase"]), tmp_path / "bound")
    refused = chat.seen[5]
    later = [seen.at - refused.at for seen in chat.seen if seen.at > refused.at]
    in_flight = [wait for wait in later if wait < 0.4]  # sent before the refusal had come
    assert len(in_flight) <= 8 and all(wait < 0.3 for wait in in_flight)
    assert len(later) > 10


def test_no_more_at_once_than_allowed(chat: Chat, tmp_path: Path) -> None:
    chat.delay = 0.02
    chat.misdeeds = lambda number, prompt: "500" if number % 5 == 0 else ""
    synthetic_stage(settings(chat, concurrency=3, kinds=["short-short", "classification"]), tmp_path)
    assert chat.most_active == 3


@pytest.mark.parametrize("cap", ["tokens", "money"])
def test_the_budget_is_never_passed_and_raising_it_goes_on(chat: Chat, tmp_path: Path, cap: str) -> None:
    tried: Counter[str] = Counter()

    def misdeeds(number: int, prompt: str) -> str:
        tried[prompt] += 1
        if tried[prompt] > 1:
            return ""
        return {0: "closed", 3: "not json", 7: "500"}.get(number % 10, "")

    chat.misdeeds = misdeeds

    def cost() -> float:
        read, written = chat.tokens
        return read + written if cap == "tokens" else (read * 1.0 + written * 5.0) / 1e6

    config = settings(chat, max_tokens=400, kinds=["short-long", "paraphrase"])
    name, caps = f"budget_{cap}", [9_000, 16_000] if cap == "tokens" else [0.02, 0.04]
    kept = []
    for most in caps:
        facts = synthetic_stage(config.model_copy(update={name: most}), tmp_path)
        assert most / 3 < cost() <= most
        spent = facts["tokens_in"] + facts["tokens_out"] + facts["tokens_assumed"]
        assert cost() <= (spent if cap == "tokens" else facts["money"]) <= most
        assert facts["budget_is_spent"]
        kept.append(sum(facts["rows"].values()))
        not_asked = sum(counts["not asked"] for counts in facts["unanswered"].values())
        assert kept[-1] + not_asked == 4 * facts["tasks"]
    facts = synthetic_stage(config, tmp_path)
    assert kept[0] < kept[1] < sum(facts["rows"].values()) == 48
    assert not facts["budget_is_spent"]
    assert set(chat.answered.values()) == {1}  # nothing finished was asked for again


def test_killed_and_continued(chat: Chat, tmp_path: Path) -> None:
    config = settings(chat, concurrency=3, kinds=["long-short", "clustering"])
    synthetic_stage(config, tmp_path / "whole")
    answered = Counter(chat.answered)
    chat.seen.clear()
    chat.answered.clear()
    chat.tokens[:] = [0, 0]
    chat.delay = 0.03
    for after in (5, 25):
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, config.model_dump_json(), str(tmp_path / "killed")], cwd=ROOT
        )
        deadline = time.monotonic() + 60
        while len(chat.seen) < after and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    facts = synthetic_stage(config, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    for name in ("rows.parquet", "provenance.parquet"):
        ours, theirs = (tmp_path / run / name / "part-00000.parquet" for run in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert set(chat.answered) == set(answered)
    twice = sum(chat.answered.values()) - len(chat.answered)
    assert twice <= 2 * config.concurrency  # those that were in flight when a kill came
    # A kill may come between the line in the journal and the request.
    assert 0 <= facts["requests"] - len(chat.seen) <= 2 * config.concurrency
    # The server knows what the lost answers cost; the journal counts no less.
    assert sum(chat.tokens) <= facts["tokens_in"] + facts["tokens_out"] + facts["tokens_assumed"]
    assert synthetic_stage(config, tmp_path / "killed") == facts


RUN = """
import sys
from pathlib import Path
from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.stage import synthetic_stage
synthetic_stage(SyntheticStage.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


class Oracle:
    """Finds texts near that begin alike: the first letters of a query are those of its positive."""

    def encode(
        self, texts: Sequence[str], *, prompt: str, instruction: str | None, too_long: Literal["truncate"]
    ) -> np.ndarray:
        assert (prompt == "query") == (instruction is not None)
        return np.array([[1.0, 0.0] if "far" not in text else [0.0, 1.0] for text in texts], np.float32)


# What is done to the row of a number, and the reason for which it is then rejected.
SPOILT: dict[int, tuple[Callable[[dict[str, str]], dict[str, str]], str]] = {
    1: (lambda row: row | {"positive": "auf Deutsch " + row["positive"]}, "wrong language"),
    2: (lambda row: row | {"query": "The   SAME Straße"}, ""),
    3: (lambda row: row | {"query": "the same strasse "}, ""),
    4: (lambda row: row | {"positive": "far " + row["positive"]}, "positive not above negative"),
    5: (lambda row: row | {"negative": row["positive"].upper()}, "copied text"),
    6: (lambda row: row | {"positive": "too short"}, "too short"),
    7: (lambda row: row | {"query": "q" * 700}, "too long"),
    8: (lambda row: row | {"query": "the same\tSTRAßE"}, "duplicate"),
}


def test_what_is_wrong_with_a_row_is_counted_and_told(chat: Chat, tmp_path: Path) -> None:
    def change_row(prompt: str, row: dict[str, str]) -> dict[str, str]:
        number = int(re.findall(r"example number (\d+)", prompt)[0])
        row = {part: f"near {text}" for part, text in row.items()} | {"negative": f"far {row['negative']}"}
        return SPOILT[number][0](row) if number in SPOILT else row

    chat.change_row = change_row
    config = settings(chat, kinds=["short-long"], languages=["eng"], tasks=1, rows=10)
    asked: list[tuple[str, str]] = []

    def is_other(tag: str, texts: Sequence[str]) -> list[bool]:
        asked.extend((tag, text) for text in texts)
        return ["Deutsch" in text for text in texts]

    facts = synthetic_stage(config, tmp_path, load_encoder=Oracle, is_other=is_other)
    rejects = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    expected = Counter(reason for _, reason in SPOILT.values() if reason)
    assert Counter(row["reason"] for row in rejects) == expected == facts["rejected"]["eng"]
    assert sum(facts["rows"].values()) + total(facts["rejected"]) == 10
    assert len([text for _, text in asked if "Deutsch" in text]) == 1 and {tag for tag, _ in asked} == {"eng"}
    tally = json.loads((tmp_path / "tally.json").read_text())["rows"]["synthetic/org-tester-1/short-long"]
    assert tally == {"eng": {**expected, "kept": 10 - expected.total()}}


def test_a_real_model_ranks_each_pair_as_it_would_alone(
    chat: Chat, tmp_path: Path, model_folder: Path
) -> None:
    config = settings(chat, kinds=["short-long", "classification"], languages=["eng"], tasks=5, rows=10)
    facts = synthetic_stage(config, tmp_path, load_encoder=lambda: Embedder(model_folder))
    embedder, checked = Embedder(model_folder), 0
    rejected = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    for row in rows_of(tmp_path) + rejected:
        if row["task"] != "retrieval":
            assert "reason" not in row  # labels are not ranked
            continue
        instruction = "Find a passage that meets this wish"
        query = embedder.encode(row["query"], instruction=instruction, too_long="truncate")
        right, wrong = (
            embedder.encode([row["positives"][0], row["negatives"][0]], too_long="truncate") @ query
        )
        assert (right > wrong) == ("reason" not in row)
        checked += 1
    assert checked == 50 and facts["rejected"]["eng"] == {"positive not above negative": len(rejected)}
    assert 0 < len(rejected) < 50


def test_the_detector_speaks_against_clear_cases_alone() -> None:
    pytest.importorskip("py3langid")
    english = "The committee will meet again on Thursday to decide about the new bridge."
    german = "Der Ausschuss tritt am Donnerstag wieder zusammen und berät über die neue Brücke."
    is_other = check_languages(0.9)
    assert is_other("deu", [english, german, "Hello"]) == [True, False, False]
    assert is_other("eng", [english, german]) == [False, True]


def test_each_run_leaves_what_it_found_and_nothing_older(chat: Chat, tmp_path: Path) -> None:
    config = settings(chat, kinds=["short-long"])
    none = synthetic_stage(config, tmp_path, is_other=lambda tag, texts: [True] * len(texts))
    assert none["rejected"] == {tag: {"wrong language": 12} for tag in ("deu", "eng")}
    assert json.loads((tmp_path / "sources.json").read_text()) == []
    synthetic_stage(config, tmp_path)
    assert len(rows_of(tmp_path)) == 24 and not (tmp_path / "rejects.parquet").exists()


def test_labels_that_were_not_asked_for(chat: Chat, tmp_path: Path) -> None:
    def change_row(prompt: str, row: dict[str, str]) -> dict[str, str]:
        number = int(re.findall(r"example number (\d+)", prompt)[0])
        spoilt = {1: {"label": "green"}, 2: {"other_label": row["label"]}, 3: {"other_label": "none of them"}}
        return row | spoilt.get(number, {})

    chat.change_row = change_row
    facts = synthetic_stage(settings(chat, kinds=["clustering"], tasks=2, rows=5), tmp_path)
    assert facts["rejected"] == {tag: {"wrong label": 6} for tag in ("deu", "eng")}
    assert {tuple(row["negatives"]) for row in rows_of(tmp_path)} == {()}


def test_a_request_that_never_succeeds_is_given_up_alone(chat: Chat, tmp_path: Path) -> None:
    bad = re.compile(r"example number 2\.")
    chat.misdeeds = lambda number, prompt: "not json" if bad.search(prompt) else ""
    config = settings(chat, kinds=["paraphrase"], retries=2, languages=["eng"])
    facts = synthetic_stage(config, tmp_path / "json")
    assert facts["unanswered"] == {"eng": {"not JSON": 3}} and facts["faults"] == {"not JSON": 9}
    assert sum(facts["rows"].values()) == 9
    asked = len(chat.seen)
    assert synthetic_stage(config, tmp_path / "json") == facts and len(chat.seen) == asked

    chat.misdeeds = lambda number, prompt: "400" if bad.search(prompt) else ""
    facts = synthetic_stage(config, tmp_path / "refused")
    assert facts["unanswered"] == {"eng": {"400": 3}}


def test_a_server_that_is_gone_stops_the_run_and_keeps_what_is_finished(chat: Chat, tmp_path: Path) -> None:
    chat.misdeeds = lambda number, prompt: "503" if number >= 10 else ""
    config = settings(chat, kinds=["paraphrase"], retries=2)
    with pytest.raises(
        F2Error, match=r"did not answer in 3 attempts \(503: .*asks for nothing that is finished"
    ):
        synthetic_stage(config, tmp_path)
    good = sum(chat.answered.values())
    assert good == 10
    chat.misdeeds = lambda number, prompt: ""
    synthetic_stage(config, tmp_path)
    assert set(chat.answered.values()) == {1} and len(rows_of(tmp_path)) == 24


def test_the_key_is_nowhere(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.misdeeds = lambda number, prompt: "500" if number == 1 else ""
    facts = synthetic_stage(settings(chat, kinds=["paraphrase"]), tmp_path)
    assert KEY not in json.dumps(facts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    wrong = KEY + "-wrong"
    monkeypatch.setenv("TEST_API_KEY", wrong)
    asked = len(chat.seen)
    with pytest.raises(F2Error, match=r"the server refused \(401: .*Bearer \(key\)") as raised:
        synthetic_stage(settings(chat, kinds=["paraphrase"], seed=1), tmp_path)
    assert wrong not in str(raised.value)
    assert len(chat.seen) - asked <= 4  # nobody tries again
    monkeypatch.delenv("TEST_API_KEY")
    with pytest.raises(UsageError, match="'TEST_API_KEY' that holds the API key is not set"):
        synthetic_stage(settings(chat), tmp_path)


@pytest.mark.parametrize("name", ["response_format", "seed", "temperature", "max_tokens"])
def test_what_a_server_does_not_take_is_left_out(chat: Chat, tmp_path: Path, name: str) -> None:
    chat.misdeeds = lambda number, prompt: f"no {name}"
    config = settings(chat, kinds=["paraphrase"], concurrency=1)
    facts = synthetic_stage(config, tmp_path)
    assert [seen.status for seen in chat.seen].count(400) == 1 and sum(facts["rows"].values()) == 24
    first, *_, last = (seen.body for seen in chat.seen)
    assert first.keys() - last.keys() == {name}
    assert last.get("max_completion_tokens") == (2048 if name == "max_tokens" else None)


def test_answers_outlive_the_stage(chat: Chat, tmp_path: Path) -> None:
    config = settings(chat, kinds=["short-short"], answers=str(tmp_path / "answers"))
    synthetic_stage(config, tmp_path / "first")
    asked = len(chat.seen)
    synthetic_stage(config.model_copy(update={"rows": 6}), tmp_path / "second")
    assert len(chat.seen) - asked == 2 * 3 * 2  # two rows more of each task
    assert {row["hash"] for row in rows_of(tmp_path / "first")} < {
        row["hash"] for row in rows_of(tmp_path / "second")
    }


def test_a_model_that_repeats_itself_is_not_asked_for_ever(chat: Chat, tmp_path: Path) -> None:
    # Each request for tasks brings two new ones, until the prompt knows them all.
    config = settings(chat, kinds=["short-long"], languages=["eng"], tasks=50, rows=1)
    chat.misdeeds = lambda number, prompt: "" if is_for_row(prompt) or number < 2 else "wrong schema"
    facts = synthetic_stage(config.model_copy(update={"retries": 0}), tmp_path)
    assert (facts["tasks"], facts["tasks_wanted"]) == (40, 50)
    assert sum(not is_for_row(seen.prompt) for seen in chat.seen) == 4  # two in vain
    known = [len(re.findall(r"^- Find \w+ \d+\.$", seen.prompt, re.MULTILINE)) for seen in chat.seen[:4]]
    assert known == [0, 20, 40, 40]


def test_a_request_that_stops_three_runs_is_given_up(chat: Chat, tmp_path: Path) -> None:
    chat.misdeeds = lambda number, prompt: "500" if "example number 4." in prompt else ""
    config = settings(
        chat, kinds=["paraphrase"], languages=["eng"], tasks=1, rows=4, retries=1, concurrency=1
    )
    for _ in range(2):
        with pytest.raises(F2Error, match="did not answer in 2 attempts"):
            synthetic_stage(config, tmp_path)
    facts = synthetic_stage(config, tmp_path)
    assert facts["unanswered"] == {"eng": {"500": 1}} and sum(facts["rows"].values()) == 3
    assert facts["requests"] == len(chat.seen) == 1 + 3 + 3 * 2
