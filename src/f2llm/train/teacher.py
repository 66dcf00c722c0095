"""A teacher: texts in, raw vectors out; from a model beside the student, from its cache, or from a server.

With a cache, the vectors of all texts of the run are computed before its first step, by a teacher that is then let go
of; what earlier runs have computed is not computed again. Rank 0 alone writes the cache, all ranks compute for it.

Shape suffixes: N texts, D dims of the student, T of the teacher.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from f2llm.errors import UsageError
from f2llm.model.base import Base
from f2llm.model.decoder import DecoderConfig
from f2llm.model.folder import Model, ModelFacts, load_decoder
from f2llm.progress import progress, say
from f2llm.recipe_train import TrainStage
from f2llm.train.distillation import Target
from f2llm.train.ranks import Ranks, on_main, shard
from f2llm.train.sampler import Sampler
from f2llm.train.sources import Text
from f2llm.train.step import vectors_of
from f2llm.train.teacher_cache import TeacherCache
from f2llm.train.teacher_endpoint import Endpoint
from f2llm.train.terms import Read
from f2llm.train.training import PROJECTION, Training, precision_of
from f2llm.train.watch import has_collapsed, spread

TOKENS_AT_ONCE = 4096  # of a teacher without a student beside it, which keeps no graph
LOOKED_AT = 64  # steps among which one of texts that mean different things is looked for
TEXTS_AT_ONCE = 4096  # whose vectors are computed before they are written to the cache

TEXTS_OF_FIT = 8  # times the student's width, that a projection is fitted to
RIDGE = 1e-3  # of the mean square of the student's numbers, against directions that it does not use yet

Given = Model | Base | Endpoint
"""A teacher as it is given: in memory, in a folder that is read when it is needed, or behind a URL."""
Vectors = Callable[[Sequence[Text]], Tensor]
"""Raw vectors [N, T] of a batch's texts, on every rank."""


@dataclass(frozen=True)
class Teacher:
    """Where the vectors come from, and how wide they are."""

    vectors: Vectors
    width: int
    facts: ModelFacts | None  # None of a server's


def open_teacher(
    config: TrainStage,
    given: Given,
    sampler: Sampler,
    read: Read,
    ranks: Ranks,
    first: int,
) -> Teacher:
    """Ready a teacher for the steps from `first` on; with a cache, see to it that this has all their texts.

    Raises:
        UsageError: a server is to read texts of which there are only token ids.
        F2Error: the cache is another teacher's, or the server gives no vectors.
    """
    asked = config.distillation
    contents: Callable[[Sequence[Text]], list[bytes]]
    if isinstance(given, Endpoint):
        if not isinstance(next(iter(sampler[0].texts)), str):
            raise UsageError(
                f"a teacher behind a URL ({given.url}) reads texts, but a token store has none; give the folder of "
                "rows as 'data'."
            )
        identity, facts, contents = f"{given.url} {given.model}", None, _as_utf8
        width = on_main(given.width, ranks)
    else:
        # Vectors in bf16 are others than in float32.
        identity = f"{given.facts.identity} {precision_of(config, ranks)}"
        facts, width = given.facts, _config_of(given).hidden_size
        contents = partial(_as_ids, read, given, config.max_length)
    compute = partial(_compute, config, given, read, ranks)
    if asked.cache:
        open_cache = partial(TeacherCache, Path(asked.cache), identity, width, asked.cache_precision)
        _fill(open_cache, contents, compute, sampler, first, ranks)
        vectors = _recall(open_cache(), contents, ranks)
    else:
        vectors = compute()
    teacher = Teacher(vectors, width, facts)
    _warn_of_collapse(teacher, sampler, first, ranks)
    return teacher


def _recall(cache: TeacherCache, contents: Callable[[Sequence[Text]], list[bytes]], ranks: Ranks) -> Vectors:
    return lambda texts: torch.from_numpy(cache.vectors(contents(texts))).to(ranks.device)


def _warn_of_collapse(teacher: Teacher, sampler: Sampler, first: int, ranks: Ranks) -> None:
    """A teacher without EOS or with another pooling gives about the same vector for all texts; a student learns it."""
    steps = (step for step in range(first, min(first + LOOKED_AT, sampler.steps)) if sampler[step].in_batch)
    if (step := next(steps, None)) is None:
        return
    found = spread(teacher.vectors(sampler[step].texts))
    if ranks.is_main and has_collapsed(found):
        say(
            f"warning: the teacher gives about the same vector for texts that mean different things (mean pairwise "
            f"cosine {found.mean_cosine:.4f}, effective rank {found.effective_rank:.1f} of {found.full_rank}); see "
            "whether its pooling and its last token are what it was trained with."
        )


def _config_of(given: Model | Base) -> DecoderConfig:
    return given.config if isinstance(given, Base) else given.decoder.config


def _as_utf8(texts: Sequence[Text]) -> list[bytes]:
    return [text.encode() for text in texts]


def _as_ids(read: Read, given: Model | Base, max_length: int, texts: Sequence[Text]) -> list[bytes]:
    return [np.asarray(ids, "<i4").tobytes() for ids in read(given, texts, max_length)]


def _compute(config: TrainStage, given: Given, read: Read, ranks: Ranks) -> Vectors:
    """The teacher at work; it is in memory as long as this is."""
    if isinstance(given, Endpoint):
        endpoint = given
        return lambda texts: on_main(lambda: torch.from_numpy(endpoint.vectors(texts)), ranks).to(
            ranks.device
        )
    model = (
        given if isinstance(given, Model) else Model(load_decoder(given.folder), given.tokenizer, given.facts)
    )
    shard(model.decoder.eval(), ranks, precision_of(config, ranks), False)
    budget = config.tokens_per_microbatch or TOKENS_AT_ONCE

    def vectors(texts: Sequence[Text]) -> Tensor:
        return vectors_of(model.decoder, read(model, texts, config.max_length), budget, ranks)

    return vectors


# --- What a student's vectors are set against


def target_of(config: TrainStage, training: Training, teacher: Teacher) -> Target:
    """The teacher's dimensions that the student is to equal, or the projection that is trained along."""
    if PROJECTION in training.learnt:
        return Target(projection_TD=training.learnt[PROJECTION])
    if not config.distillation.terms.keys() & {"mse", "cosine"}:
        return Target()
    dimensions = taught_dimensions(config, training.model, teacher)
    return Target(torch.tensor(dimensions, device=next(training.model.decoder.parameters()).device))


def taught_dimensions(config: TrainStage, student: Model, teacher: Teacher) -> list[int]:
    """Which of the teacher's dimensions the student's are to equal, by their numbers."""
    dimensions = list(range(student.decoder.config.hidden_size))
    if config.distillation.target == "kept":
        kept, facts = student.facts.kept, teacher.facts
        if kept is None or facts is None or kept["of"] not in (facts.identity, facts.parent):
            raise UsageError(
                "distillation's target is 'kept', but the student was not cut from the teacher or from the model that "
                "the teacher was trained from, so their dimensions do not correspond; take 'prefix' or 'projection'."
            )
        dimensions = kept["hidden"]
    if max(dimensions) >= teacher.width:
        raise UsageError(
            f"the teacher is {teacher.width} wide, but its student of {len(dimensions)} is to learn its dimension "
            f"{max(dimensions)}; take a wider teacher, or distillation's target 'projection'."
        )
    return dimensions


def fit_projection(
    config: TrainStage,
    training: Training,
    teacher: Teacher,
    sampler: Sampler,
    read: Read,
    budget: int,
    ranks: Ranks,
) -> None:
    """Begin the projection where it is best for the student as it is: least squares over the first steps' texts.

    From a random one the student would first have to turn its space; the learning rates that suit its weights are far
    too small for a matrix to follow instead.
    """
    projection_TD = training.learnt[PROJECTION]
    wanted = TEXTS_OF_FIT * projection_TD.shape[1]
    texts: dict[Text, None] = {}
    for step in range(sampler.steps):
        texts |= dict.fromkeys(sampler[step].texts)
        if len(texts) >= wanted:
            break
    chosen = list(texts)[:wanted]
    ids = read(training.model, chosen, config.max_length)
    student_ND = vectors_of(training.model.decoder, ids, budget, ranks).double().cpu()
    taught_NT = teacher.vectors(chosen).double().cpu()
    if config.distillation.terms.keys() == {"cosine"}:
        student_ND, taught_NT = F.normalize(student_ND, dim=-1), F.normalize(taught_NT, dim=-1)
    gram_DD = student_ND.T @ student_ND
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    fitted_DT = on_main(lambda: torch.linalg.solve(gram_DD, student_ND.T @ taught_NT), ranks)
    with torch.no_grad():
        projection_TD.copy_(fitted_DT.T)


# --- Filling the cache


def _fill(
    open_cache: Callable[[], TeacherCache],
    contents: Callable[[Sequence[Text]], list[bytes]],
    begin: Callable[[], Vectors],
    sampler: Sampler,
    first: int,
    ranks: Ranks,
) -> None:
    """Compute what the cache lacks of the steps from `first` on."""
    opened: list[TeacherCache] = []  # on rank 0
    on_main(lambda: opened.append(open_cache()), ranks)
    missing = _missing(opened[0], contents, sampler, first) if opened else iter(())
    vectors: Vectors | None = None
    added = 0
    while texts := on_main(lambda: next(missing, []), ranks):
        vectors = vectors or begin()
        found_NT = vectors(texts).float().cpu()
        on_main(lambda: opened[0].add(contents(texts), found_NT.numpy()), ranks)  # noqa: B023 - called at once
        added += len(texts)
    if ranks.is_main and added:
        say(f"the teacher's vectors of {added:,} texts were computed")


def _missing(
    cache: TeacherCache, contents: Callable[[Sequence[Text]], list[bytes]], sampler: Sampler, first: int
) -> Iterator[list[Text]]:
    """Texts of the run that the cache lacks, each once, TEXTS_AT_ONCE or a few more at a time."""
    waiting: dict[bytes, Text] = {}
    with progress(total=sampler.steps - first, what="teacher's vectors", unit="step") as bar:
        for step in range(first, sampler.steps):
            texts = sampler[step].texts
            of_texts = contents(texts)
            waiting |= {of_texts[n]: texts[n] for n in cache.missing(of_texts)}
            if len(waiting) >= TEXTS_AT_ONCE:
                yield list(waiting.values())
                waiting = {}
            bar.advance(1)
        if waiting:
            yield list(waiting.values())
