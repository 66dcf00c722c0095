"""Base models that are refused, each in one sentence, and those of the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects

from f2llm.errors import F2Error, UsageError
from f2llm.model.base import load_base
from f2llm.model.folder import Model, save_model

MakeModel = Callable[..., Model]
MakeFolder = Callable[..., Path]


def refused(folder: Path) -> str:
    """The sentence with which the folder is refused."""
    with pytest.raises(F2Error) as refusal:
        load_base(folder)
    sentence = str(refusal.value)
    assert str(folder) in sentence and "\n" not in sentence
    return sentence


# --- What would be computed differently


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        ({"pooling_mode_mean_tokens": True}, "pooling of mean,"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": False}, "pooling of cls,"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, "lasttoken and max"),
        ({"pooling_mode_lasttoken": False, "word_embedding_dimension": 24}, "the mean"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": ["lasttoken", "cls"]}, "lasttoken and cls"),
    ],
)
def test_another_pooling_is_refused_by_name(
    make_folder: MakeFolder, pooling: dict[str, Any], named: str
) -> None:
    assert named in refused(make_folder(changes={"1_Pooling/config.json": pooling}))


@pytest.mark.parametrize("mode", ["lasttoken", ["lasttoken"]])
def test_pooling_of_the_last_token_is_accepted_in_each_form(make_folder: MakeFolder, mode: object) -> None:
    folder = make_folder(changes={"1_Pooling/config.json": {"pooling_mode": mode}})
    assert load_base(folder).facts.identity == load_base(make_folder()).facts.identity


def modules(*kinds: str) -> str:
    return json.dumps(
        [{"type": kind, "path": f"{i}_{kind.rpartition('.')[2]}"} for i, kind in enumerate(kinds)]
    )


TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"


@pytest.mark.parametrize(
    "kind",
    ["sentence_transformers.models.Dense", "my_code.Normalize", "sentence_transformers.models.WordWeights"],
)
def test_a_further_module_is_refused_by_name(make_folder: MakeFolder, kind: str) -> None:
    folder = make_folder()
    (folder / "modules.json").write_text(modules(TRANSFORMER, POOLING, kind))
    assert kind in refused(folder)


def test_the_pooling_that_is_looked_at_is_that_of_the_modules(make_folder: MakeFolder) -> None:
    changes = {
        "1_Pooling/config.json": {"pooling_mode": "lasttoken"},
        "2_Pooling/config.json": {"pooling_mode": "cls"},
    }
    folder = make_folder(changes=changes)
    (folder / "modules.json").write_text(modules(TRANSFORMER, POOLING))
    load_base(folder)
    (folder / "modules.json").write_text(
        modules(TRANSFORMER, "sentence_transformers.base.modules.normalize.Normalize", POOLING)
    )
    assert "pooling of cls" in refused(folder)
    (folder / "modules.json").write_text('[{"type": 3}]')
    assert "modules.json" in refused(folder)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("config.json", {"is_causal": False}, "is_causal"),
        ("config.json", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Bidirectional"}}, "auto_map"),
        ("config.json", {"model_type": "qwen2"}, "qwen2"),
        ("config.json", {"use_sliding_window": True}, "use_sliding_window"),
        ("config.json", {"num_hidden_layers": 3, "layer_types": None}, "layers.2"),
        ("config.json", {"vocab_size": 402}, "[402, 24]"),
        ("sentence_bert_config.json", {"config_args": {"is_causal": False}}, "is_causal"),
        ("sentence_bert_config.json", {"config_kwargs": {"is_causal": False}}, "is_causal"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(
    make_folder: MakeFolder, name: str, changes: dict[str, Any], named: str
) -> None:
    assert named in refused(make_folder(changes={name: changes}))


# --- Incomplete folders


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(
    make_folder: MakeFolder, random_peer: Callable[..., Any]
) -> None:
    load_base(make_folder(random_peer(vocab_size=403)))
    assert "token 402" in refused(make_folder(random_peer(vocab_size=402)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of"])
def test_a_missing_file_is_named(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder(shard="20KB")
    (path,) = folder.glob(f"{name}*")
    path.unlink()
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "pytorch_model.bin", 3])
def test_an_index_that_points_elsewhere_is_refused(make_folder: MakeFolder, name: object) -> None:
    folder = make_folder(shard="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert repr(name) in refused(folder)
    path.write_text("{}")
    assert "weight_map" in refused(folder)


# --- The hub

SURPLUS = {"pytorch_model.bin", "modeling.py", "onnx/model.onnx", "step-5/model.safetensors", "model.gguf"}


@pytest.fixture
def hub(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one sharded model, which has files of all kinds; records what it is asked for."""
    folder = make_folder(shard="20KB", changes={"1_Pooling/config.json": {"pooling_mode": "lasttoken"}})
    for name in SURPLUS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    asked: list[tuple[Any, ...]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_a_model_of_the_hub_is_fetched_and_read(
    hub: list[tuple[Any, ...]], tmp_path: Path, revision: str | None
) -> None:
    model = load_base("Qwen/Qwen3-0.6B" + (f"@{revision}" if revision else ""))
    assert hub == [("Qwen/Qwen3-0.6B", revision)]
    here = load_base(tmp_path / "base")
    assert model.facts == here.facts
    expected = here.decoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.decoder.state_dict().items())
    files = {path.relative_to(tmp_path / "cache").as_posix() for path in (tmp_path / "cache").rglob("*")}
    assert "1_Pooling/config.json" in files and "generation_config.json" in files and not files & SURPLUS


def test_a_folder_here_comes_before_a_model_of_the_hub(
    hub: list[tuple[Any, ...]], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = save_model(Path("owner/name"), make_model())
    assert load_base("owner/name").facts == load_base(Path("owner/name")).facts == facts
    assert not hub


@pytest.mark.parametrize("source", ["nowhere", "/no/folder", "./a/b", "a/b/c", "a/b@", "base/config.json"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{source} is not a folder"):
        load_base(source)
    assert not hub


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    import httpx2

    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/model"))
    return kind(f"{status} error\n\nfor url ...", response=response)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), UsageError, "neither a folder here nor a model"),
        (http_error(errors.RevisionNotFoundError, 404), UsageError, "neither a folder here nor a model"),
        (errors.HFValidationError("bad --"), UsageError, "neither a folder here nor a model"),
        (http_error(errors.GatedRepoError, 403), UsageError, "asks for an agreement"),
        (http_error(errors.HfHubHTTPError, 503), F2Error, "HfHubHTTPError: 503 error"),
        (errors.LocalEntryNotFoundError("Got: ConnectError\nAn error"), F2Error, "Got: ConnectError"),
        (TimeoutError(), F2Error, "TimeoutError"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[F2Error], said: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(F2Error, match=said) as refusal:
        load_base("Qwen/Qwen3-0.6B@main")
    assert type(refusal.value) is kind
    assert "Qwen/Qwen3-0.6B@main" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_real_client_without_a_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(F2Error, match="cannot be reached") as refusal:
        load_base("Qwen/Qwen3-0.6B")
    assert "\n" not in str(refusal.value)


def test_a_full_disk_is_not_taken_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left"):
        load_base("Qwen/Qwen3-0.6B")
