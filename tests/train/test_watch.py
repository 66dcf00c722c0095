"""Watching: a log that survives kills, TensorBoard's events, the note beside the bar, alarms neither late nor false."""

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder, DecoderConfig, initialise
from f2llm.model.folder import Model
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import encode
from f2llm.runtime import peak_memory
from f2llm.train.watch import (
    FEWEST,
    MOST_VECTORS,
    SETTLED,
    Spread,
    check_finite,
    check_spread,
    memory_gigabytes,
    note,
    open_log,
    spread,
)

MakeModel = Callable[..., Model]


def step_record(step: int) -> dict[str, Any]:
    return {"step": step, "source": "names", "loss": 1.5 + step, "in_batch": 1.25 + step}


def validation(step: int) -> dict[str, Any]:
    sources = {"names": {"measure": "ndcg_at_10", "ndcg_at_10": 0.5, "languages": {"deu": {"queries": 9}}}}
    return {"step": step, "validation": {"score": step / 8, "sources": sources}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- The log


def test_a_continued_log_reads_as_one_that_never_stopped(tmp_path: Path) -> None:
    """Steps 0 to 3, a kill, and on from the checkpoint at step 2; a validation comes before the step of its number."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    records = [validation(0), step_record(0), step_record(1), validation(2), step_record(2), step_record(3)]
    with open_log(straight, 0) as log:
        for record in records:
            log.write(record)
    with open_log(killed, 0) as log:
        for record in records[:-1]:
            log.write(record)
    with open_log(killed, 2) as log:
        for record in records[3:]:
            log.write(record)
    assert lines(killed) == lines(straight) == records


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(cut: int, tmp_path: Path) -> None:
    """With `cut` 1 only the line's end is missing; 2 and 3 leave braces that close something else at the end."""
    path = tmp_path / "log.jsonl"
    torn = json.dumps(validation(1))[: 1 - cut or None]
    whole = json.dumps(step_record(0)) + "\n"
    path.write_text(whole + torn)
    with open_log(path, 9) as log:
        log.write(step_record(1))
    kept = [validation(1)] if cut == 1 else []
    assert lines(path) == [step_record(0), *kept, step_record(1)]


def test_a_log_torn_inside_a_letter_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0, "source": "x"}\n{"step": 1, "source": "\xe5\xa4')
    with open_log(path, 5):
        pass
    assert lines(path) == [{"step": 0, "source": "x"}]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path, 0) as log:
        log.write(step_record(0))
        assert lines(path) == [step_record(0)]


def test_an_alarm_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path / "log.jsonl", 0) as log:
        log.alarm(7, "all is lost.")
    assert lines(tmp_path / "log.jsonl") == [{"step": 7, "alarm": "all is lost."}]
    assert capsys.readouterr().err == "warning: all is lost.\n"


# --- TensorBoard


def events(folder: Path) -> list[Any]:
    """All events of a folder, file by file; each record is its length and its data, both with a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            length, length_sum = struct.unpack_from("<QI", data, place)
            assert length_sum == masked_crc32c(data[place : place + 8])
            event = data[place + 12 : place + 12 + length]
            assert struct.unpack_from("<I", data, place + 12 + length)[0] == masked_crc32c(event)
            found.append(Event.FromString(event))
            place += 16 + length
    return found


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit, rotated and shifted as TensorFlow's TFRecord format has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_checksum_of_the_tests_is_castagnolis() -> None:
    """The check value of the CRC catalogue: 0xE3069283 for the nine digits."""
    masked = (masked_crc32c(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (masked >> 17 | masked << 15) & 0xFFFFFFFF == 0xE3069283


def test_events_have_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with open_log(tmp_path / "log.jsonl", 0, tensorboard=True) as log:
        log.write(step_record(3))
        log.write(validation(4))
        log.alarm(5, "words are no scalars")
    shown = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert shown == [
        (3, "train/loss", 4.5),
        (3, "train/in_batch", 4.25),
        (4, "validation/score", 0.5),
        (4, "validation/sources/names/ndcg_at_10", 0.5),
        (4, "validation/sources/names/languages/deu/queries", 9),
    ]


def test_a_continued_run_voids_the_events_that_it_writes_again(tmp_path: Path) -> None:
    """Both runs write within a second: none of the first one's events are lost."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import SessionLog

    for done in (0, 2):
        with open_log(tmp_path / "log.jsonl", done, tensorboard=True) as log:
            for step in range(done, 4):
                log.write({"step": step, "loss": float(step + 10 * done)})
    found = events(tmp_path / "tensorboard")
    starts = [n for n, event in enumerate(found) if event.session_log.status == SessionLog.START]
    assert [found[n].step for n in starts] == [0, 2]
    steps = [event.step for event in found if event.summary.value]
    assert steps == [0, 1, 2, 3, 2, 3]
    # What a reader does: at a start, everything from its step on is forgotten.
    last = {event.step: event.summary.value[0].simple_value for event in found if event.summary.value}
    assert last == {0: 0, 1: 1, 2: 22, 3: 23}


def test_without_the_library_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", *(name for name in sys.modules if name.startswith("tensorboardX."))):
        monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(UsageError, match=r"^[^.]*tensorboardX[^.]*install f2llm\[tensorboard\][^.]*\.$"),
        open_log(tmp_path / "log.jsonl", 0, tensorboard=True),
    ):
        pytest.fail("opened")
    assert list(tmp_path.iterdir()) == []


# --- The progress bar


def test_note_names_loss_terms_speed_norm_rate_and_memory() -> None:
    record = {
        "step": 1234,
        "source": "names",
        "loss": 2.5,
        "in_batch": 2.25,
        "hard": 0.25,
        "gradient_norm": 0.876,
        "learning_rate": 0.0003,
        "tokens_per_second": 12345.6,
        "memory_gigabytes": 1.26,
        "mean_cosine": 0.5,
        "validated": True,
    }
    assert note(record) == (
        "loss 2.500, in_batch 2.250, hard 0.250, norm 0.88, lr 3.0e-04, 12,346 tokens/s, 1.3 GB"
    )


def test_memory_on_a_cpu_is_the_peak_of_the_process() -> None:
    assert memory_gigabytes(torch.device("cpu")) == pytest.approx(peak_memory() / 1e9, rel=0.05)


# --- A number that is not finite


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0), (1.0, math.nan)]
)
def test_a_broken_number_stops_the_run_and_says_where(loss: float, norm: float, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000010"
    for kept in ("step-00000005", checkpoint.name):
        (tmp_path / kept).mkdir()
    with pytest.raises(F2Error) as caught:
        check_finite(12, loss, norm, "base", source="names", checkpoints=tmp_path)
    message = str(caught.value)
    for said in ("step 12 of base", str(loss), f"norm {norm}", "'names'", str(checkpoint), "learning_rate"):
        assert said in message
    assert len(re.findall(r"\.(?:\s|$)", message)) == 1  # one sentence
    with pytest.raises(F2Error, match="no checkpoint yet"):
        check_finite(0, loss, norm, "base", source="names", checkpoints=tmp_path / "none")


def test_finite_numbers_pass(tmp_path: Path) -> None:
    check_finite(0, 1e30, 0.0, "base", source="names", checkpoints=tmp_path)


# --- Spread


def naive_cosine(vectors_ND: Tensor) -> float:
    pairs = [
        F.cosine_similarity(a, b, dim=0).item()
        for i, a in enumerate(vectors_ND.double())
        for j, b in enumerate(vectors_ND.double())
        if i != j
    ]
    return sum(pairs) / len(pairs)


def naive_rank(vectors_ND: Tensor) -> float:
    """From the eigenvalues of the matrix of cosines, whose roots are the singular values."""
    unit_ND = vectors_ND.double() / vectors_ND.double().norm(dim=1, keepdim=True)
    values = [max(0.0, value) ** 0.5 for value in torch.linalg.eigvalsh(unit_ND @ unit_ND.T).tolist()]
    shares = [value / sum(values) for value in values if value > 1e-6]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize(("count", "width", "shift"), [(20, 7, 0.0), (9, 40, 0.5), (30, 30, 5.0)])
def test_spread_is_what_its_definition_says(count: int, width: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = 10 ** torch.empty(count, 1).uniform_(-3, 3, generator=generator)
    vectors_ND = (torch.randn(count, width, generator=generator) + shift) * lengths
    found = spread(vectors_ND)
    assert found.mean_cosine == pytest.approx(naive_cosine(vectors_ND), abs=1e-6)
    assert found.effective_rank == pytest.approx(naive_rank(vectors_ND), rel=1e-4)
    assert found.full_rank == min(count, width)


def test_spread_of_cases_that_are_known() -> None:
    one = torch.tensor([3.0, 4.0, 0.0, 1.0])
    assert spread(one.repeat(9, 1)) == pytest.approx((1, 1, 4))
    assert spread(torch.eye(8) * 5) == pytest.approx((0, 8, 8))
    # Two opposite bundles lie on one line, which no mean cosine shows.
    assert spread(torch.cat([one.repeat(5, 1), -one.repeat(5, 1)])) == pytest.approx((-1 / 9, 1, 4))
    # Two orthogonal pairs: of 12 ordered pairs 4 are equal; singular values sqrt(2) twice.
    assert spread(torch.eye(2, 5).repeat(2, 1)) == pytest.approx((1 / 3, 2, 4))


def test_spread_of_many_vectors_looks_at_all_parts_of_them() -> None:
    """Half of a large batch has collapsed, as only its queries may: neither half alone is what is seen."""
    count, width = 5 * MOST_VECTORS + 3, 32
    vectors_ND = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    vectors_ND[: count // 2] = vectors_ND[0]
    found = spread(vectors_ND)
    assert found.mean_cosine == pytest.approx(0.25, abs=0.03)  # pairs inside the half
    assert found.effective_rank > width / 2


def test_spread_of_bf16_with_a_gradient_and_of_nothing_finite() -> None:
    vectors_ND = torch.randn(20, 8, dtype=torch.bfloat16, requires_grad=True)
    assert spread(vectors_ND).mean_cosine == pytest.approx(naive_cosine(vectors_ND.detach()), abs=1e-6)
    broken = spread(torch.full((20, 16), math.nan))
    assert math.isnan(broken.mean_cosine) and math.isnan(broken.effective_rank)
    assert check_spread(broken, step=1000, warmup_steps=0, where="base") is None  # check_finite's business


# --- The alarm


def alarm(vectors_ND: Tensor, step: int = 0, warmup_steps: int = 0, ongoing: bool = False) -> str | None:
    return check_spread(
        spread(vectors_ND), step=step, warmup_steps=warmup_steps, where="base", ongoing=ongoing
    )


def vectors_of(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Tensor:
    with torch.no_grad():
        return decoder(torch.tensor(list(chain.from_iterable(texts))), [len(ids) for ids in texts])


def bundle(noise: float, count: int = 64, width: int = 64) -> Tensor:
    """Vectors around one direction."""
    generator = torch.Generator().manual_seed(1)
    return torch.ones(width) + noise * torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("step", [0, 1, 50, SETTLED, 100_000])
def test_a_collapsed_set_alarms_at_once(step: int) -> None:
    sentence = alarm(bundle(1e-3), step=step, warmup_steps=1000)
    assert sentence is not None
    assert f"vectors of base have collapsed at step {step}: mean pairwise cosine 1.0000" in sentence
    assert "of 64" in sentence and "learning_rate" in sentence
    assert len(re.findall(r"\.(?:\s|$)", sentence)) == 1


@pytest.mark.parametrize("noise", [3.0, 1.0])
def test_spread_vectors_never_alarm(noise: float) -> None:
    for step in (0, SETTLED, 100_000):
        assert alarm(bundle(noise), step=step) is None
        assert alarm(bundle(noise), step=step, ongoing=True) is None


def test_one_sign_alone_alarms_only_when_the_run_has_settled() -> None:
    """A mean cosine of 0.994 with all directions in use, as random weights may have; and one line, both ways."""
    narrow = bundle(0.08)
    line = torch.cat([bundle(1e-3), -bundle(1e-3)])
    assert spread(narrow).mean_cosine > 0.99 and spread(narrow).effective_rank > 5
    assert abs(spread(line).mean_cosine) < 0.1 and spread(line).effective_rank < 2
    for vectors_ND in (narrow, line):
        assert alarm(vectors_ND, step=SETTLED - 1) is None
        assert alarm(vectors_ND, step=SETTLED) is not None
        assert alarm(vectors_ND, step=SETTLED, warmup_steps=SETTLED + 50) is None
        assert alarm(vectors_ND, step=SETTLED + 50, warmup_steps=SETTLED + 50) is not None


def test_a_run_at_the_bound_is_told_of_once() -> None:
    """Mean cosines that waver about the bound, and then leave it for good."""
    shown, ongoing = [], False
    for step, cosine in enumerate([0.98, 0.991, 0.985, 0.992, 0.98, 0.96, 0.98, 0.995], start=SETTLED):
        sentence = check_spread(
            Spread(cosine, 9.0, 64), step=step, warmup_steps=0, where="base", ongoing=ongoing
        )
        if sentence and not ongoing:
            shown.append(step - SETTLED)
        ongoing = sentence is not None
    assert shown == [1, 7]


def test_few_vectors_or_dimensions_are_not_judged() -> None:
    assert alarm(bundle(0, count=FEWEST - 1), step=1000) is None
    assert alarm(bundle(0, width=FEWEST - 1), step=1000) is None
    assert alarm(bundle(0, count=FEWEST, width=FEWEST), step=1000) is not None


@pytest.mark.parametrize("instructed", [False, True])
def test_an_untrained_model_does_not_alarm(instructed: bool, make_model: MakeModel, names: list[str]) -> None:
    prefix = query_prefix("Given a question, retrieve the passages that answer it") if instructed else ""
    for seed in range(3):
        model = make_model(seed)
        ids = encode(
            model.tokenizer,
            [prefix + name for name in names],
            eos_id=model.facts.eos_id,
            max_length=200,
            too_long="error",
        )
        vectors_ND = vectors_of(model.decoder, ids)
        for step in (0, SETTLED - 1):
            assert alarm(vectors_ND, step=step) is None, spread(vectors_ND)


@pytest.mark.parametrize("prefix", [0, 15, 30])
@pytest.mark.parametrize(("width", "layers", "vocabulary"), [(24, 2, 500), (128, 2, 4000), (256, 4, 8000)])
def test_a_new_decoder_does_not_alarm(width: int, layers: int, vocabulary: int, prefix: int) -> None:
    """Weights as training starts with, short texts behind an instruction of `prefix` tokens, EOS at the end."""
    generator = torch.Generator().manual_seed(width)
    decoder = Decoder(DecoderConfig(vocabulary, width, 2 * width, layers, 4, 2, 16))
    initialise(decoder, generator)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

    instruction = tokens(prefix, prefix + 1)
    texts = [instruction + tokens(1, 6) + [1] for _ in range(128)]
    vectors_ND = vectors_of(decoder, texts)
    assert alarm(vectors_ND, step=SETTLED - 1) is None, spread(vectors_ND)
