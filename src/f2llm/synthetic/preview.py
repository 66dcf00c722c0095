"""What a run will ask and may cost, before anything is sent."""

from pathlib import Path
from typing import NamedTuple

from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.generate import TASKS_AT_ONCE, Author, Topic
from f2llm.synthetic.kinds import KINDS, LONG, Kind, LabelTask, Span, Task
from f2llm.synthetic.prompt_files import load_prompts

# Assumed, not measured: a token has so many bytes in a prompt, which is mostly English; an answer so many tokens.
BYTES_A_TOKEN = 4.0
TOKENS_OF_TASK = 40
TOKENS_OF_SHORT, TOKENS_OF_LONG = 30, 250


class Preview(NamedTuple):
    """A run, roughly."""

    requests_for_tasks: int
    requests_for_rows: int
    tokens_in: int
    tokens_out: int
    money: float
    prompts: list[str]
    """The first request for tasks and for a row, of the first language of each kind; equal ones once."""

    def __str__(self) -> str:
        asked = self.requests_for_tasks + self.requests_for_rows
        lines = [f"{'-' * 80}\n{prompt}" for prompt in self.prompts]
        lines += [
            f"{'-' * 80}\nAbout {asked:,} requests, {self.requests_for_tasks:,} of them for tasks; "
            f"{self.tokens_in:,} tokens sent and {self.tokens_out:,} answered",
            f"(assumed, not measured); {self.money:,.2f} in the unit of the prices, without retries.",
        ]
        return "\n".join(lines)


def preview(config: SyntheticStage) -> Preview:
    """Prompts as they will be sent, with a made-up task, and what all requests may come to."""
    author = Author(config, load_prompts(Path(config.prompts) if config.prompts else None))
    task_requests = -(-config.tasks // TASKS_AT_ONCE)
    prompts: dict[str, tuple[str, str]] = {}
    tokens_in = tokens_out = 0.0
    for topic in author.topics():
        texts = _prompts(author, topic)
        prompts.setdefault(topic.kind, texts)
        row_requests = config.tasks * config.rows
        counts = (task_requests, row_requests)
        tokens_in += sum(len(t.encode()) * n for t, n in zip(texts, counts, strict=True)) / BYTES_A_TOKEN
        tokens_out += config.tasks * TOKENS_OF_TASK + row_requests * _row_tokens(KINDS[topic.kind])
    topics = len(author.topics())
    return Preview(
        topics * task_requests,
        topics * config.tasks * config.rows,
        round(tokens_in),
        round(tokens_out),
        (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6,
        list(dict.fromkeys(text for texts in prompts.values() for text in texts)),
    )


def _prompts(author: Author, topic: Topic) -> tuple[str, str]:
    task = Task(task="(a task that the model will propose)")
    if KINDS[topic.kind].has_labels:
        task = LabelTask(task=task.task, name="(its name)", labels=["(one label)", "(another)"])
    return author.tasks_request(topic, 0, []).text, author.row_request(topic, task, 0).request.text


def _row_tokens(kind: Kind) -> int:
    def tokens(span: Span) -> int:
        return TOKENS_OF_LONG if span == LONG else TOKENS_OF_SHORT

    return tokens(kind.query_span) + 2 * tokens(kind.document_span)
