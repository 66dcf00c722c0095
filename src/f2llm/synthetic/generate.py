"""What is asked: first for tasks, then for rows of each task (arXiv 2401.00368, section 3.1).

kind and language -> requests for tasks, each of which is told what came before -> tasks -> one request for each row

All of it is a function of the settings, the prompts and earlier answers, so a run that goes on asks the same requests.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from f2llm.languages import english_name
from f2llm.recipe_corpus import KindName, SyntheticStage
from f2llm.synthetic.asking import Asker, Request, each
from f2llm.synthetic.kinds import KINDS, Kind, LabelTask, Task, bullets, row_form, tasks_form
from f2llm.synthetic.prompt_files import Prompt, language_with_codes

TASKS_AT_ONCE = 20  # asked for in one request
TOLD = 100  # tasks that a request for further ones is told, the latest
VAIN_REQUESTS = 2  # in a row without a new task, after which no more are asked for


class Topic(NamedTuple):
    """What tasks are proposed for."""

    kind: KindName
    language: str


Tasks = Mapping[Topic, list[Task]]


@dataclass(frozen=True)
class RowRequest:
    """A request for one row, and what the row is to be."""

    request: Request
    kind: Kind
    language: str
    task: Task
    number: int
    label: str | None
    """That the text is to have."""


@dataclass(frozen=True)
class Author:
    """Makes requests out of settings and prompts."""

    config: SyntheticStage
    prompts: Mapping[str, Prompt]

    def topics(self) -> list[Topic]:
        """By kind, then by language; no language is translated into itself."""
        config = self.config
        return [
            Topic(kind, language)
            for kind, language in product(config.kinds, config.languages)
            if not (kind == "bitext" and language == config.other_language)
        ]

    def tasks_request(self, topic: Topic, number: int, known: list[Task]) -> Request:
        """Request number 0, 1, ... for tasks, with those that are there."""
        kind = KINDS[topic.kind]
        values = {
            **self._common(topic),
            "count": min(TASKS_AT_ONCE, self.config.tasks),
            "known": bullets([task.task for task in known[-TOLD:]]),
        }
        prompt, keys = self.prompts[kind.tasks_prompt], (*topic, number)
        return self._request(prompt, prompt.fill(values, self.config.seed, *keys), tasks_form(kind), *keys)

    def row_request(self, topic: Topic, task: Task, number: int) -> RowRequest:
        """Request number 0, 1, ... for a row of a task."""
        kind, label = KINDS[topic.kind], None
        values: dict[str, str | int] = {**self._common(topic), "task": task.task, "number": number + 1}
        if isinstance(task, LabelTask):
            label = task.labels[number % len(task.labels)]  # all labels in turn
            values |= {"name": task.name, "labels": bullets(task.labels), "label": label}
        prompt, keys = self.prompts[kind.rows_prompt], (*topic, number)
        text = prompt.fill(values, self.config.seed, *keys, task.key)
        request = self._request(prompt, text, row_form(kind), *keys)
        return RowRequest(request, kind, topic.language, task, number, label)

    def row_requests(self, tasks: Tasks) -> Iterator[RowRequest]:
        """All requests for rows, in the order of the rows."""
        for topic in self.topics():
            for task, number in product(tasks[topic], range(self.config.rows)):
                yield self.row_request(topic, task, number)

    def _common(self, topic: Topic) -> dict[str, str | int]:
        kind, other = KINDS[topic.kind], self.config.other_language
        return {
            "language": language_with_codes(topic.language),
            "language_name": english_name(topic.language),
            "other_language": language_with_codes(other),
            "other_language_name": english_name(other),
            "query": kind.query,
            "document": kind.document,
        }

    def _request(self, prompt: Prompt, text: str, form: type, *keys: str | int) -> Request:
        config = self.config
        return Request(text, form, prompt.id, (config.model, config.seed, config.temperature, *keys))


async def propose(author: Author, asker: Asker, topic: Topic) -> list[Task]:
    """The tasks of a topic: as many as are wanted, or fewer where the model repeats itself or the budget ends."""
    wanted, number, vain = author.config.tasks, 0, 0
    tasks: dict[str, Task] = {}
    while len(tasks) < wanted and vain < VAIN_REQUESTS:
        request = author.tasks_request(topic, number, list(tasks.values()))
        ended = await asker.ask(request)
        if ended is None:
            break
        before = len(tasks)
        if ended.answer is not None:
            for task in request.form.model_validate(ended.answer).tasks:  # type: ignore[attr-defined]
                tasks.setdefault(task.key, task)
        vain = 0 if len(tasks) > before else vain + 1
        number += 1
    return list(tasks.values())[:wanted]


async def ask_all(author: Author, asker: Asker, advance: Callable[[], None]) -> Tasks:
    """Ask for all tasks, then for all rows; returns the tasks. The answers are in the journal.

    Args:
        advance: called after each row.
    """
    tasks: dict[Topic, list[Task]] = {}

    async def propose_one(topic: Topic) -> None:
        tasks[topic] = await propose(author, asker, topic)

    async def ask_one(row: RowRequest) -> None:
        await asker.ask(row.request)
        advance()

    at_once = author.config.concurrency
    await each(author.topics(), propose_one, at_once)
    if asker.problem is None:
        await each(author.row_requests(tasks), ask_one, at_once)
    return tasks
