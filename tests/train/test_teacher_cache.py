"""The teacher cache: what comes out is what went in, once; killed writers, several writers, damage."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from f2llm.errors import F2Error
from f2llm.train import teacher_cache
from f2llm.train.teacher_cache import Precision, TeacherCache, Vectors

D = 6


def vector_of(text: str) -> Vectors:
    return np.random.default_rng(list(text.encode())).normal(size=D).astype(np.float32) * 3


def learn(cache: TeacherCache, texts: list[str]) -> list[str]:
    """Put in what is missing; what that was."""
    contents = [text.encode() for text in texts]
    missing = cache.missing(contents)
    if missing:
        cache.add([contents[n] for n in missing], np.stack([vector_of(texts[n]) for n in missing]))
    return [texts[n] for n in missing]


def recall(cache: TeacherCache, texts: list[str]) -> Vectors:
    return cache.vectors([text.encode() for text in texts])


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SEGMENT", 7)


@pytest.mark.parametrize(("precision", "error"), [("float16", 2**-11), ("int8", 0.5 / 127)])
def test_each_distinct_text_is_computed_once_and_read_back_in_its_place(
    tmp_path: Path, precision: Precision, error: float
) -> None:
    rng = np.random.default_rng(0)
    texts = [f"text {n} é 文" for n in range(60)]
    asked: list[str] = []
    for _ in range(3):  # runs, one after the other
        cache = TeacherCache(tmp_path, "it", D, precision)
        for _ in range(12):
            some = [texts[i] for i in rng.integers(0, 60, size=int(rng.integers(1, 20)))]
            asked += learn(cache, some)
            for text, found_D in zip(some, recall(cache, some), strict=True):
                expected_D = vector_of(text)
                assert np.abs(found_D - expected_D).max() <= error * np.abs(expected_D).max() * 1.01
    assert len(asked) == len(set(asked)) == len(cache) > 40
    np.testing.assert_array_equal(
        recall(TeacherCache(tmp_path, "it", D, precision), asked), recall(cache, asked)
    )


def test_what_was_just_added_is_not_missing_any_more(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, "it", D)
    assert learn(cache, ["a", "b", "a"]) == ["a", "b"]
    assert learn(cache, ["b", "c"]) == ["c"]
    assert len(cache) == 3


def test_more_texts_than_a_segment_holds_at_once(tmp_path: Path) -> None:
    texts = [str(n) for n in range(40)]
    cache = TeacherCache(tmp_path, "it", D)
    assert learn(cache, texts) == texts
    first_ND = recall(cache, texts)
    np.testing.assert_allclose(first_ND, [vector_of(text) for text in texts], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(first_ND, recall(TeacherCache(tmp_path, "it", D), texts))


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, other = TeacherCache(tmp_path, "it", D), TeacherCache(tmp_path, "it", D)
    for n in range(0, 30, 3):
        learn(one, [f"{n}", f"{n + 1}"])
        learn(other, [f"{n + 1}", f"{n + 2}"])
    texts = [str(n) for n in range(30)]
    found_ND = recall(TeacherCache(tmp_path, "it", D), texts)
    np.testing.assert_allclose(found_ND, [vector_of(text) for text in texts], rtol=1e-3, atol=1e-4)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from f2llm.train.teacher_cache import TeacherCache
cache = TeacherCache(Path(sys.argv[1]), "it", 6)
for n in range(10 ** 6):
    contents = [f"{n} {i}".encode() for i in range(5)]
    if missing := cache.missing(contents):
        cache.add([contents[i] for i in missing], np.full((len(missing), 6), float(n), np.float32))
    print(n, flush=True)
"""


def test_what_a_killed_run_had_is_there(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        done = [int(process.stdout.readline()) for _ in range(40)][-1]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        cache = TeacherCache(tmp_path, "it", D)
        for n in range(done):
            assert (recall(cache, [f"{n} {i}" for i in range(5)]) == n).all()


def test_what_a_crash_leaves_is_passed_over_and_damage_is_named(tmp_path: Path) -> None:
    learn(TeacherCache(tmp_path, "it", D), ["a", "b"])
    keys, vectors = next(tmp_path.glob("*.keys")), next(tmp_path.glob("*.vectors"))
    whole = vectors.read_bytes()
    vectors.write_bytes(whole + b"half a vec")  # its keys were never written
    keys.write_bytes(keys.read_bytes() + b"half a key")
    assert learn(TeacherCache(tmp_path, "it", D), ["a", "b"]) == []
    vectors.write_bytes(whole[:-1])
    with pytest.raises(F2Error, match=r"has 23 bytes, its 2 keys call for 24"):
        TeacherCache(tmp_path, "it", D)


def test_a_cache_is_of_one_teacher(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, "it", D)
    with pytest.raises(F2Error, match="is a cache of teacher 'it', expected 'other'"):
        TeacherCache(tmp_path, "other", D)
    with pytest.raises(F2Error, match="precision 'float16', expected 'int8'"):
        TeacherCache(tmp_path, "it", D, "int8")
    with pytest.raises(F2Error, match=r"gave vectors of shape \[1, 5\]"):
        cache.add([b"a"], np.zeros((1, 5), np.float32))
    with pytest.raises(F2Error, match="does not fit into float16"):
        cache.add([b"a"], np.full((1, D), 1e6, np.float32))
    learn(cache, ["b"])
    with pytest.raises(F2Error, match="lacks the vectors of 1 of 2 texts"):
        recall(cache, ["a", "b"])
    assert len(cache) == 1
