"""The teacher cache: what comes out is what went in, once; killed writers, several writers, damage."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from f2llm.errors import F2Error
from f2llm.train import teacher_cache
from f2llm.train.teacher_cache import Precision, TeacherCache, Vectors

D = 6


def vector_of(text: str) -> Vectors:
    return np.random.default_rng(list(text.encode())).normal(size=D).astype(np.float32) * 3


def teacher(asked: list[str]) -> Callable[[list[str]], Vectors]:
    def compute(texts: list[str]) -> Vectors:
        asked.extend(texts)
        return np.stack([vector_of(text) for text in texts])

    return compute


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
            found_ND = cache.vectors(some, teacher(asked))
            for text, found_D in zip(some, found_ND, strict=True):
                expected_D = vector_of(text)
                assert np.abs(found_D - expected_D).max() <= error * np.abs(expected_D).max() * 1.01
            np.testing.assert_array_equal(found_ND, cache.vectors(some, teacher(asked)))
    assert len(asked) == len(set(asked)) == len(cache) > 40
    np.testing.assert_array_equal(
        TeacherCache(tmp_path, "it", D, precision).vectors(asked, teacher([])),
        cache.vectors(asked, teacher([])),
    )


def test_more_texts_than_a_segment_holds_at_once(tmp_path: Path) -> None:
    texts = [str(n) for n in range(40)]
    asked: list[str] = []
    cache = TeacherCache(tmp_path, "it", D)
    first_ND = cache.vectors(texts, teacher(asked))
    np.testing.assert_array_equal(first_ND, cache.vectors(texts, teacher(asked)))
    np.testing.assert_allclose(first_ND, [vector_of(text) for text in texts], rtol=1e-3, atol=1e-4)
    assert asked == texts
    np.testing.assert_array_equal(first_ND, TeacherCache(tmp_path, "it", D).vectors(texts, teacher(asked)))
    assert asked == texts


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, other = TeacherCache(tmp_path, "it", D), TeacherCache(tmp_path, "it", D)
    for n in range(0, 30, 3):
        one.vectors([f"{n}", f"{n + 1}"], teacher([]))
        other.vectors([f"{n + 1}", f"{n + 2}"], teacher([]))
    asked: list[str] = []
    after = TeacherCache(tmp_path, "it", D)
    found_ND = after.vectors([str(n) for n in range(30)], teacher(asked))
    assert not asked
    np.testing.assert_allclose(found_ND, [vector_of(str(n)) for n in range(30)], rtol=1e-3, atol=1e-4)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from f2llm.train.teacher_cache import TeacherCache
cache = TeacherCache(Path(sys.argv[1]), "it", 6)
for n in range(10 ** 6):
    cache.vectors([f"{n} {i}" for i in range(5)], lambda texts: np.full((len(texts), 6), float(texts[0].split()[0])))
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
        asked: list[str] = []
        cache = TeacherCache(tmp_path, "it", D)
        for n in range(done):
            assert (cache.vectors([f"{n} {i}" for i in range(5)], teacher(asked)) == n).all()
        assert not asked


def test_what_a_crash_leaves_is_passed_over_and_damage_is_named(tmp_path: Path) -> None:
    TeacherCache(tmp_path, "it", D).vectors(["a", "b"], teacher([]))
    keys, vectors = next(tmp_path.glob("*.keys")), next(tmp_path.glob("*.vectors"))
    whole = vectors.read_bytes()
    vectors.write_bytes(whole + b"half a vec")  # its keys were never written
    keys.write_bytes(keys.read_bytes() + b"half a key")
    asked: list[str] = []
    TeacherCache(tmp_path, "it", D).vectors(["a", "b"], teacher(asked))
    assert not asked
    vectors.write_bytes(whole[:-1])
    with pytest.raises(F2Error, match=r"has 23 bytes, its 2 keys call for 24"):
        TeacherCache(tmp_path, "it", D)


def test_a_cache_is_of_one_teacher(tmp_path: Path) -> None:
    TeacherCache(tmp_path, "it", D)
    with pytest.raises(F2Error, match="is a cache of teacher 'it', expected 'other'"):
        TeacherCache(tmp_path, "other", D)
    with pytest.raises(F2Error, match="precision 'float16', expected 'int8'"):
        TeacherCache(tmp_path, "it", D, "int8")
    with pytest.raises(F2Error, match=r"gave vectors of shape \[1, 5\]"):
        TeacherCache(tmp_path, "it", D).vectors(["a"], lambda _: np.zeros((1, 5), np.float32))
    with pytest.raises(F2Error, match="does not fit into float16"):
        TeacherCache(tmp_path, "it", D).vectors(["a"], lambda _: np.full((1, D), 1e6, np.float32))
    assert not len(TeacherCache(tmp_path, "it", D))
