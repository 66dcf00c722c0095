"""Teachers: beside the student, from a cache, behind a URL; and the projection that a student is seen through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.embedding_server import KEY, WIDTH, serving_embeddings, vector_of
from tests.train.runs import Batches, MakeModel, Settings, Stopped, interrupt, same_bits, steps_of, weights

from f2llm.errors import F2Error, UsageError
from f2llm.model.base import read_base
from f2llm.model.folder import Model, load_model, save_model
from f2llm.train import teacher as teachers
from f2llm.train import teacher_endpoint
from f2llm.train.ranks import ALONE
from f2llm.train.stage import train_stage
from f2llm.train.step import vectors_of
from f2llm.train.teacher import Teacher, fit_projection
from f2llm.train.teacher_endpoint import Endpoint
from f2llm.train.terms import token_ids
from f2llm.train.trainer import train
from f2llm.train.training import PROJECTION, begin

OF_ANGLES = {"cosine": 1.0, "similarity": 1.0, "ranking": 1.0}


@pytest.fixture
def teacher_folder(make_model: MakeModel, tmp_path: Path) -> Path:
    save_model(tmp_path / "teacher", make_model(seed=1, hidden_size=30))
    return tmp_path / "teacher"


@pytest.fixture
def run(
    settings: Settings, batches: Batches, make_model: MakeModel, teacher_folder: Path
) -> Callable[..., Model]:
    """Trains a student of the teacher's folder into a folder, with these settings of distillation."""

    def go(out: Path, stop: int | None = None, **distillation: Any) -> Model:
        config = settings(teacher="./teacher", distillation=distillation, steps=9)
        model = make_model()
        made = Stopped(batches(config), {} if stop is None else {stop: interrupt})
        train(config, model, made, read_base(teacher_folder), out)
        return model

    return go


def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a teacher's weights cannot be read."""

    def fail(folder: Path) -> None:
        raise AssertionError(f"the teacher in {folder} was read")

    monkeypatch.setattr(teachers, "load_decoder", fail)


# --- The cache


@pytest.mark.parametrize(("precision", "error"), [("float16", 1e-3), ("int8", 3e-2)])
def test_a_cached_teacher_teaches_the_same_but_for_its_precision(
    run: Callable[..., Model], tmp_path: Path, precision: str, error: float
) -> None:
    """Steps behind the first have moved apart by the rounding of those before."""
    terms = {"terms": {"mse": 1.0, **OF_ANGLES}}
    run(tmp_path / "online", **terms)
    run(tmp_path / "cached", **terms, cache=str(tmp_path / "cache"), cache_precision=precision)
    online, cached = steps_of(tmp_path / "online")[0], steps_of(tmp_path / "cached")[0]
    assert (
        online.keys()
        == cached.keys()
        > {"teacher_mse", "teacher_cosine", "teacher_similarity", "teacher_ranking"}
    )
    for name in ("loss", *(f"teacher_{term}" for term in terms["terms"])):
        assert cached[name] == pytest.approx(online[name], rel=error), name
    assert cached["loss"] != online["loss"], "no rounding: was the cache used?"


def test_what_a_cache_has_no_teacher_computes_again(
    run: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "first", cache=str(tmp_path / "cache"))
    no_teacher(monkeypatch)
    second = run(tmp_path / "second", cache=str(tmp_path / "cache"))
    assert same_bits(weights(first), weights(second))
    with pytest.raises(AssertionError, match="was read"):
        run(tmp_path / "third", cache=str(tmp_path / "another"))


def test_a_run_that_was_stopped_goes_on_from_the_cache_alone(
    run: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    straight = run(tmp_path / "straight", cache=cache, target="projection")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut" / "straight", stop=5, cache=cache, target="projection")
    no_teacher(monkeypatch)
    ended = run(tmp_path / "cut" / "straight", cache=cache, target="projection")
    assert same_bits(weights(straight), weights(ended))


def test_a_stop_while_the_cache_is_filled_loses_nothing(
    run: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is asked for each text once, over both runs together."""
    monkeypatch.setattr(teachers, "TEXTS_AT_ONCE", 10)
    asked: list[bytes] = []
    compute = vectors_of

    def counted(decoder: Any, ids: Any, budget: int, ranks: Any) -> torch.Tensor:
        if len(asked) >= 30 and not there.exists():
            there.touch()
            raise KeyboardInterrupt
        asked.extend(str(list(text)).encode() for text in ids)
        return compute(decoder, ids, budget, ranks)

    there = tmp_path / "stopped once"
    monkeypatch.setattr(teachers, "vectors_of", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", cache=str(tmp_path / "cache"))
    assert not (tmp_path / "run").exists(), "no step can have been made"
    run(tmp_path / "run", cache=str(tmp_path / "cache"))
    assert len(asked) == len(set(asked)) > 30


def test_a_teacher_that_says_the_same_of_all_texts_is_told_of(
    settings: Settings,
    batches: Batches,
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mute = make_model(seed=1)
    with torch.no_grad():
        mute.decoder.norm.weight.zero_()
        mute.decoder.norm.weight[0] = 1.0
    config = settings(teacher="teacher", distillation={"terms": OF_ANGLES}, steps=3)
    train(config, make_model(), batches(config), mute, tmp_path)
    assert (
        "the teacher gives about the same vector for texts that mean different things"
        in capsys.readouterr().err
    )
    train(config, make_model(), batches(config), make_model(seed=1), tmp_path / "healthy")
    assert "the teacher gives" not in capsys.readouterr().err


def test_the_teacher_alone_can_be_learnt_from(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    """Without contrastive terms, in the loss or in the log, a student comes to agree with its teacher."""
    config = settings(
        teacher="teacher",
        distillation={"terms": {"similarity": 1.0}, "contrastive": 0.0},
        steps=60,
        formats=["retrieval"],
    )
    train(config, make_model(), batches(config), make_model(seed=1, hidden_size=30), tmp_path)
    log = steps_of(tmp_path)
    assert all("in_batch" not in record and record["loss"] == record["teacher_similarity"] for record in log)
    assert sum(record["loss"] for record in log[-10:]) < 0.7 * sum(record["loss"] for record in log[:10])


# --- A projection


def test_a_projection_begins_where_it_fits_best(
    settings: Settings, batches: Batches, make_model: MakeModel
) -> None:
    """A teacher that is a matrix times the student is seen through nearly that matrix."""
    config = settings(teacher="teacher", distillation={"target": "projection"}, steps=30)
    model, sampler = make_model(), batches(config)
    matrix_TD = torch.randn(30, 24, generator=torch.Generator().manual_seed(3))

    def vectors(texts: Any) -> torch.Tensor:
        return vectors_of(model.decoder, token_ids(model, texts, config.max_length), 500) @ matrix_TD.T

    training = begin(config, model, 0, ALONE, taught_width=30)
    fit_projection(config, training, Teacher(vectors, 30, None), sampler, token_ids, 500, ALONE)
    texts = sampler[29].texts
    seen = (
        vectors_of(model.decoder, token_ids(model, texts, config.max_length), 500)
        @ training.learnt[PROJECTION].detach().T
    )
    assert float((seen - vectors(texts)).square().mean()) < 0.01 * float(vectors(texts).square().mean())


def test_a_projection_is_trained_and_left_out_of_the_model(
    settings: Settings, model_folder: Path, teacher_folder: Path, rows_folder: Path, tmp_path: Path
) -> None:
    config = settings(teacher="./teacher", distillation={"target": "projection"})
    facts = train_stage(
        config,
        data=rows_folder,
        base=model_folder,
        tokenizer=None,
        teacher=teacher_folder,
        out=tmp_path / "out",
        seed=1,
        recipe_hash="",
    )
    assert (
        load_model(tmp_path / "out").decoder.state_dict().keys()
        == load_model(model_folder).decoder.state_dict().keys()
    )
    assert facts["parameters"] == sum(p.numel() for p in load_model(model_folder).decoder.parameters())


# --- A server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_endpoint, "FIRST_PAUSE", 0.01)


def test_a_server_teaches_and_is_asked_for_each_text_once(
    settings: Settings,
    model_folder: Path,
    rows_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the stage, twice; it is busy, breaks off, and gives its vectors in another order meanwhile."""
    monkeypatch.setenv("EMBEDDING_KEY", KEY)
    monkeypatch.setattr(teacher_endpoint, "TEXTS_AT_ONCE", 7)
    wrong = {1: "429", 2: "500", 5: "closed", 6: "503"}
    with serving_embeddings(misdeeds=lambda number: wrong.get(number, "")) as server:
        distillation = {
            "terms": OF_ANGLES,
            "target": "projection",
            "model": "tester",
            "api_key_env": "EMBEDDING_KEY",
            "cache": str(tmp_path / "cache"),
        }
        config = settings(teacher=server.address, distillation=distillation)
        for name in ("one", "two"):
            train_stage(
                config,
                data=rows_folder,
                base=model_folder,
                tokenizer=None,
                teacher=server.address,
                out=tmp_path / name,
                seed=1,
                recipe_hash="",
            )
        width = server.texts.pop("width")
        assert width == 2, "each run looks how wide the vectors are"
        assert set(server.texts.values()) == {1} and len(server.texts) > 30
    assert same_bits(*(weights(load_model(tmp_path / name)) for name in ("one", "two")))
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json*"))


def test_vectors_come_in_the_order_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_endpoint, "TEXTS_AT_ONCE", 4)
    texts = [f"text {n} 文" for n in range(11)]
    with serving_embeddings() as server:
        found = Endpoint(server.address, "tester").vectors(texts)
        assert Endpoint(server.address, "tester").width() == WIDTH
    torch.testing.assert_close(torch.from_numpy(found), torch.tensor([vector_of(text) for text in texts]))


@pytest.mark.parametrize(
    ("misdeed", "sentence"),
    [
        ("401", "gave no vectors .status 401.*mend that"),
        ("503", "gave no vectors .status 503"),
        ("not json", "answered with no list of embeddings"),
        ("one less", r"answered with vectors of shape \[2, 20\]"),
        ("not finite", "answered with numbers that are not finite"),
    ],
)
def test_a_server_without_vectors_is_an_error(misdeed: str, sentence: str) -> None:
    with serving_embeddings(misdeeds=lambda _: misdeed) as server:
        with pytest.raises(F2Error, match=sentence) as caught:
            Endpoint(server.address, "tester", KEY).vectors(["a", "b", "c"])
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
        assert server.requests == (teacher_endpoint.ATTEMPTS if misdeed == "503" else 1)
    with pytest.raises(F2Error, match="gave no vectors .ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "tester").vectors(["a"])


def test_a_server_reads_no_token_ids(settings: Settings) -> None:
    class Numbers:
        steps = 1

        def __getitem__(self, step: int) -> Any:
            return type("Batch", (), {"texts": [3, 1]})

    given = Endpoint("http://127.0.0.1:9/v1", "tester")
    config = settings(teacher=given.url, distillation={"terms": {"cosine": 1.0}, "model": "tester"})
    with pytest.raises(UsageError, match="a token store has none; give the folder of rows"):
        teachers.open_teacher(config, given, Numbers(), token_ids, ALONE, 0)  # type: ignore[arg-type]
