"""Folders broken in one way each: `verify` names the way, and nothing else; those that are whole pass whole."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from f2llm.compress.slicing import slice_model
from f2llm.errors import UsageError
from f2llm.model.folder import Model, save_model
from f2llm.model.tokenizer import EOS, PAD
from f2llm.verify.findings import Finding, Report
from f2llm.verify.folder import verify_folder

MakeModel = Callable[..., Model]
ST = "config_sentence_transformers.json"
TOKENIZER = "tokenizer_config.json"
BERT = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
GONE = object()


def change(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not GONE}
    (folder / name).write_text(json.dumps(values))


def nested(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    values = json.loads((folder / name).read_text())
    edit(values)
    (folder / name).write_text(json.dumps(values))


def without_eos(folder: Path) -> None:
    change(folder, "tokenizer.json", post_processor=None)


def eos_twice(folder: Path) -> None:
    def twice(values: Any) -> None:
        once = values["post_processor"]
        values["post_processor"] = {"type": "Sequence", "processors": [once, once]}

    nested(folder, "tokenizer.json", twice)


def eos_by_normalizer(folder: Path) -> None:
    """EOS is a character that the normalizer puts at the end: there as long as nothing is cut."""
    eos = "\u0103"  # the byte 3 in byte-level BPE's alphabet
    number = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"][eos]

    def by_normalizer(values: Any) -> None:
        values["post_processor"] = None
        values["added_tokens"].append({**values["added_tokens"][0], "id": number, "content": eos})
        step = {"type": "Replace", "pattern": {"Regex": "$"}, "content": "\u0003"}
        values["normalizer"] = {"type": "Sequence", "normalizers": [values["normalizer"], step]}

    nested(folder, "tokenizer.json", by_normalizer)
    change(folder, TOKENIZER, eos_token=eos)
    if (folder / "f2llm.json").exists():
        change(folder, "f2llm.json", eos_id=number)


def pads_instead(folder: Path) -> None:
    """PAD is appended, as in Qwen3-Embedding, while the other files name EOS."""
    text = json.dumps(json.loads((folder / "tokenizer.json").read_text())["post_processor"])
    number = json.loads((folder / "f2llm.json").read_text())["eos_id"]
    appended = text.replace(EOS, PAD).replace(f"[{number}]", f"[{1 - number}]")
    change(folder, "tokenizer.json", post_processor=json.loads(appended))


def without_normalize(folder: Path) -> None:
    nested(folder, "modules.json", lambda modules: modules.pop())


def smaller_table(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:300].clone()
    save_file(tensors, folder / "model.safetensors")
    change(folder, "config.json", vocab_size=300)


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def alike(folder: Path) -> None:
    """No token but the last reaches the vector."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors")


def half_a_file(folder: Path) -> None:
    (folder / BERT).write_text('{"max_seq_length": ')


def changed(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, name, **changes)


Break = Callable[[Path], None]
PROMPT = "Instruct: Find this name in another language\nQuery: "
# What is done to a folder of ours, and which checks it fails then.
BROKEN: dict[str, tuple[Break, set[str]]] = {
    "EOS off the post-processor": (without_eos, {"eos-appended", "identity", "loads"}),
    "EOS twice": (eos_twice, {"eos-appended", "identity", "loads"}),
    "EOS lost by truncation": (eos_by_normalizer, {"eos-survives-truncation", "identity", "loads"}),
    "PAD appended": (pads_instead, {"eos-named", "pad-token", "identity", "loads"}),
    "another EOS in a file": (changed(TOKENIZER, eos_token="<|im_end|>"), {"eos-named"}),
    "another EOS by number": (changed("config.json", eos_token_id=[1, 0]), {"eos-named"}),
    "PAD is EOS": (changed(TOKENIZER, pad_token={"content": EOS}), {"pad-token"}),
    "no PAD": (changed(TOKENIZER, pad_token=GONE), {"pad-token"}),
    "an unknown PAD": (changed(TOKENIZER, pad_token="<|fill|>"), {"pad-token"}),
    "an unknown side": (changed(TOKENIZER, padding_side="both"), {"padding-side"}),
    "mean pooling": (
        changed(POOLING, pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
        {"pooling"},
    ),
    "two poolings": (changed(POOLING, pooling_mode_cls_token=True), {"pooling"}),
    "poolings that disagree": (changed(POOLING, pooling_mode="mean"), {"pooling"}),
    "no pooling": (changed(POOLING, pooling_mode_lasttoken=False), {"pooling"}),
    "no Normalize": (without_normalize, {"normalize-module"}),
    "flags that TEI needs": (
        changed(POOLING, pooling_mode="lasttoken", pooling_mode_cls_token=GONE),
        {"readers"},
    ),
    "no max_seq_length": (changed(BERT, max_seq_length=GONE), {"readers"}),
    "another width": (changed(POOLING, word_embedding_dimension=32), {"readers"}),
    "another limit": (changed(BERT, max_seq_length=32), {"max-length"}),
    "prompts removed": (changed(ST, prompts={}), {"prompts-named", "prompts"}),
    "a prompt edited": (changed(ST, prompts={"query": PROMPT.rstrip()}), {"prompts-named", "prompts"}),
    "prompts of no text": (changed(ST, prompts={"query": 3}), {"prompts-named", "loads"}),
    "no Matryoshka sizes": (
        changed("config.json", matryoshka_dimensions=GONE, is_matryoshka=GONE),
        {"matryoshka"},
    ),
    "full size missing": (changed("config.json", matryoshka_dimensions=[8, 16]), {"matryoshka"}),
    "another identity": (changed("f2llm.json", identity="0" * 64), {"identity", "loads"}),
    "half a file": (half_a_file, {"readers", "max-length"}),
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same without f2llm.json, as others publish it."""
    (folder / "f2llm.json").unlink()
    return folder


def found(report: Report, status: str) -> set[str]:
    return {name for name, finding in report.findings.items() if finding.status == status}


def complete(finding: Finding) -> bool:
    """A failed check says in one sentence what mends it; others need no mending."""
    sentence = finding.fix.endswith(".") and "\n" not in finding.fix
    return bool(finding.why) and (sentence if finding.status == "fail" else not finding.fix)


# --- Whole folders


def test_a_whole_folder_passes_whole(folder: Path) -> None:
    report = verify_folder(str(folder))
    assert found(report, "skip") == {"golden"}
    assert not report.failed and all(map(complete, report.findings.values()))
    assert "8, 11, 16, 24 are given, 0 and 25 refused" in report.findings["dimensions"].why


def test_a_whole_folder_of_others_passes_whole(foreign: Path) -> None:
    report = verify_folder(str(foreign))
    assert not report.failed and found(report, "skip") == {"golden", "identity"}


def test_a_model_without_instruction_has_no_prompt(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    save_model(tmp_path, replace(model, facts=replace(model.facts, instruction="")))
    report = verify_folder(str(tmp_path))
    assert not report.failed and "no prompt" in report.findings["prompts"].why
    wanted = verify_folder(str(tmp_path), query_prompt="Query: ")
    assert wanted.failed == ["prompts"]


def test_a_shorter_model_passes_at_its_own_width(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model())
    slice_model(str(tmp_path / "model"), tmp_path / "short", dim=16)
    report = verify_folder(str(tmp_path / "short"), peer=True)
    assert "0 and 17 refused" in report.findings["dimensions"].why
    # sentence-transformers truncates behind the module Normalize.
    assert report.failed == ["peer"] and "not of unit length" in report.findings["peer"].why


# --- Broken ones


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_broken_is_named(folder: Path, way: str) -> None:
    damage, expected = BROKEN[way]
    damage(folder)
    report = verify_folder(str(folder))
    assert set(report.failed) == expected
    assert all(map(complete, report.findings.values()))
    not_computed = {"vectors", "batch-invariance", "unit-norm", "prefix", "dimensions", "prompts"}
    assert (not_computed <= found(report, "skip")) == ("loads" in expected)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_eos, {"eos-appended"}),
        (eos_by_normalizer, {"eos-survives-truncation"}),
        (changed(POOLING, pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True), {"pooling", "loads"}),
        (changed("config.json", matryoshka_dimensions=[8]), {"matryoshka"}),
        (changed("config.json", matryoshka_dimensions=[24, 48]), {"matryoshka"}),
        (changed("config.json", max_position_embeddings=60), {"max-length"}),
        (smaller_table, {"vocabulary", "loads"}),
        (changed(ST, prompts={"query": "query: "}), {"prompts"}),  # f2llm leaves out what is not like Qwen's
        (changed("config.json", num_hidden_layers=3), {"weights", "loads"}),
    ],
)
def test_what_is_broken_in_a_folder_of_others_is_named(
    foreign: Path, damage: Break, expected: set[str]
) -> None:
    """f2llm appends a missing EOS itself, so it computes; others would pool another token."""
    damage(foreign)
    assert set(verify_folder(str(foreign)).failed) == expected


def test_others_need_not_say_which_sizes_they_were_trained_for(foreign: Path) -> None:
    change(foreign, "config.json", matryoshka_dimensions=GONE, is_matryoshka=GONE)
    report = verify_folder(str(foreign))
    assert not report.failed and "vLLM refuses" in report.findings["matryoshka"].why
    change(foreign, "config.json", is_matryoshka=True)
    assert verify_folder(str(foreign)).findings["matryoshka"].status == "pass"


def test_weights_that_are_not_finite_are_named(foreign: Path) -> None:
    not_finite(foreign)
    report = verify_folder(str(foreign))
    assert {"weights", "vectors"} <= set(report.failed) and "loads" not in report.failed
    assert "layers.1.mlp.up_proj.weight has 1 numbers" in report.findings["weights"].why


def test_vectors_that_tell_nothing_apart_are_named(foreign: Path) -> None:
    alike(foreign)
    report = verify_folder(str(foreign))
    assert "vectors" in report.failed and "alike" in report.findings["vectors"].why


# --- Beside sentence-transformers


def test_sentence_transformers_agrees_with_a_whole_folder(folder: Path) -> None:
    report = verify_folder(str(folder), peer=True)
    assert not report.failed and report.findings["peer"].status == "pass"
    assert "bare texts and queries" in report.findings["peer"].why


@pytest.mark.parametrize(
    ("damage", "expected", "said"),
    [
        (BROKEN["mean pooling"][0], {"pooling", "peer"}, "other vectors of bare texts"),
        (without_normalize, {"normalize-module", "peer"}, "not of unit length"),
        (
            BROKEN["a prompt edited"][0],
            {"prompts-named", "prompts", "peer"},
            "other vectors of queries",
        ),
        (changed(ST, truncate_dim=8), {"peer"}, "gives 8 dimensions, f2llm 24"),
    ],
)
def test_what_others_load_wrongly_is_named(
    folder: Path, damage: Break, expected: set[str], said: str
) -> None:
    """f2llm reads f2llm.json and computes rightly; sentence-transformers takes the other files at their word."""
    damage(folder)
    report = verify_folder(str(folder), peer=True)
    assert set(report.failed) == expected
    assert said in report.findings["peer"].why


def test_without_eos_sentence_transformers_pools_another_token(foreign: Path) -> None:
    without_eos(foreign)
    assert set(verify_folder(str(foreign), peer=True).failed) == {"eos-appended", "peer"}


def test_a_folder_that_the_peer_cannot_read_fails(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Nothing", "path": ""}]')
    report = verify_folder(str(folder), peer=True)
    assert "peer" in report.failed and "does not compute" in report.findings["peer"].why


# --- Wrong use


def test_there_has_to_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        verify_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="give the folder of a copy"):
        verify_folder("owner/name", make_golden=True)


def test_an_empty_folder_fails_without_a_traceback(tmp_path: Path) -> None:
    report = verify_folder(str(tmp_path))
    assert {"eos-appended", "pooling", "weights", "loads"} <= set(report.failed)
    assert not found(report, "pass")


# --- Folders that strangers wrote

ODD: list[Any] = [None, -1, "x", [], {}, ["x"], [None], {"x": 1}]
FILES = ("config.json", TOKENIZER, BERT, ST, POOLING, "f2llm.json", "golden.json")


def odd_values(folder: Path) -> list[tuple[str, str, Any]]:
    """Every key of every file with every odd value."""
    keys = [(name, key) for name in FILES for key in json.loads((folder / name).read_text())]
    return [(name, key, value) for name, key in keys for value in ODD]


def test_whatever_stands_in_a_file_there_is_a_report(folder: Path) -> None:
    """Another number of the seed takes others of the several hundred cases."""
    assert not verify_folder(str(folder), make_golden=True).failed
    for name, key, value in random.Random(0).sample(odd_values(folder), 60):
        before = (folder / name).read_text()
        change(folder, name, **{key: value})
        report = verify_folder(str(folder))
        assert all(map(complete, report.findings.values())), (name, key, value)
        (folder / name).write_text(before)
    assert not verify_folder(str(folder)).failed
