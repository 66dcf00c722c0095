"""The embedder with matrix units inside: the same vectors as without, and int8 under a name of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from f2llm.amx.hardware import why_not
from f2llm.embed.bulk import Job, embed_file
from f2llm.embed.compute import TorchDecoder, compute_for
from f2llm.embed.embedder import Embedder, truncate
from f2llm.errors import F2Error
from f2llm.model.base import load_base
from f2llm.model.folder import Model, save_model

if reason := why_not():
    pytest.skip(f"no matrix units here: {reason}", allow_module_level=True)

from f2llm.amx.decoder import AmxDecoder

TEXTS = ["Germany", "", "日本 と ドイツ", "a b c " * 12, "नमस्ते", "Germany"]


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitting")
    save_model(path, make_model(hidden_size=64, intermediate_size=256, head_dim=32))
    return path


def test_it_computes_on_the_units_what_torch_computes(folder: Path) -> None:
    embedder = Embedder(folder)
    assert isinstance(embedder._compute, AmxDecoder)
    torch_ones = TorchDecoder(load_base(folder).decoder)
    for prompt in (None, "query"):
        ids, _ = embedder.fit(embedder.token_ids(TEXTS, prompt=prompt), "truncate")
        expected = truncate(torch_ones.vectors(ids), 16)
        found = embedder.encode(TEXTS, prompt=prompt, dim=16, too_long="truncate")
        assert (found * expected).sum(1).min() > 0.99999


def test_int8_has_an_identity_of_its_own(folder: Path, tmp_path: Path) -> None:
    whole, small = Embedder(folder), Embedder(folder, "int8")
    assert whole.identity == load_base(folder).facts.identity
    assert small.identity != whole.identity
    assert small.identity == Embedder(folder, "int8").identity
    a, b = whole.encode(TEXTS), small.encode(TEXTS)
    assert 0.98 < (a * b).sum(1).min() < 0.99999
    for precision, embedder in (("float32", whole), ("int8", small)):
        output = tmp_path / f"{precision}.npy"
        embed_file(Job(str(folder), precision), TEXTS, output)  # type: ignore[arg-type]
        made = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        assert (made["identity"], made["precision"]) == (embedder.identity, precision)
        np.testing.assert_allclose(np.load(output), embedder.encode(TEXTS), atol=1e-5)


def test_int8_is_refused_where_it_cannot_be_had(model_folder: Path) -> None:
    with pytest.raises(F2Error, match=r"hidden width is 24, no multiple of 64.*--quantize int8"):
        compute_for(load_base(model_folder).decoder, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["there", "nowhere"])
def test_kernels_are_kept_or_compiled_anew(cache: str, folder: Path, tmp_path: Path) -> None:
    """Two processes: where the first can write, the second finds its kernels; where nobody can, both compile."""
    caches = tmp_path if cache == "there" else Path("/proc/nowhere")
    script = (
        "from f2llm import Embedder; from f2llm.amx import forward; import sys;"
        "print(Embedder(sys.argv[1]).encode('Germany').sum(), sum(forward.forward.stats.cache_hits.values()))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches)}
    printed = [
        subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert printed[0][0] == printed[1][0]
    assert [hits for _, hits in printed] == (["0", "1"] if cache == "there" else ["0", "0"])


def test_switched_off_torch_computes(folder: Path) -> None:
    script = "from f2llm import Embedder; import sys; print(type(Embedder(sys.argv[1])._compute).__name__)"
    command = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "F2LLM_AMX": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "TorchDecoder"
