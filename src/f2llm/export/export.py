"""A model folder -> a folder for another runtime, with the facts of its making and a measure of how far it agrees.

One function for all targets; what differs between them is a table. A folder appears under its name when it is whole:
until then it is a temporary one beside it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from f2llm import __version__
from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.export.gguf_file import encode_read_back, write_gguf
from f2llm.export.onnx_graph import float_linear, int8_linear, int8_weight_linear
from f2llm.export.onnx_model import write_onnx
from f2llm.export.openvino_model import write_openvino
from f2llm.export.parity import Parity, Side, measured, megabytes
from f2llm.export.readme import readme
from f2llm.export.runtimes import Encode, llama_cpp_encode, onnx_encode, openvino_encode, static_encode
from f2llm.export.sample import Sample, count_tokens, sample
from f2llm.export.static import DEFAULT_DIM, write_static
from f2llm.files import sync_folder, write_json, write_text
from f2llm.model.decoder import DecoderConfig
from f2llm.model.folder import ModelFacts, check_identity, load_model, read_config, read_facts, weight_files
from f2llm.model.prompts import query_prefix
from f2llm.tokenizer_file import load_tokenizer

SCHEMA_VERSION = 1
FACTS = "export.json"
COPIED = ("tokenizer.json", "tokenizer_config.json", "config.json")


@dataclass(frozen=True)
class Job:
    """What is exported, where to, and how."""

    model: Path
    folder: Path
    config: DecoderConfig
    facts: ModelFacts
    dim: int
    precision: str

    @property
    def prefix(self) -> str:
        """What goes in front of a query."""
        return query_prefix(self.facts.instruction, self.facts.template) if self.facts.instruction else ""


@dataclass(frozen=True)
class Opened:
    """The exported files in use."""

    encode: Encode
    runtime: str  # what computes
    note: str = ""  # why it is not the runtime that the files are for


@dataclass(frozen=True)
class Target:
    """A runtime: its precisions (the default first), and how to write and to use its files."""

    runtime: str
    precisions: tuple[str, ...]
    write: Callable[[Job], None]
    open: Callable[[Job], AbstractContextManager[Opened]]
    like_the_model: bool = True  # the same vectors of the same texts; else a space of its own, and no prompts


def export_model(
    model: Path,
    out: Path,
    to: str,
    *,
    dim: int | None = None,
    quantize: str | None = None,
    texts: Sequence[str] | None = None,
) -> Parity:
    """Write a model for another runtime, load it there, and compare.

    Args:
        model: a model folder of f2llm.
        out: the folder to make; an earlier export there is replaced, anything else is refused.
        to: one of `TARGETS`.
        dim: of the vectors, 1 to the model's width (a Matryoshka size keeps most). gguf has no way to say less than
            the width; static has 256 without it.
        quantize: one of the target's precisions; the first without it.
        texts: what to compare on, at most the first 1,000; names from CLDR without it.

    Raises:
        UsageError: an unknown target, precision or dim, or a tokenizer that the runtime has no equal for.
        F2Error: a library is missing (install f2llm[export]), or the model is damaged.
    """
    if to not in TARGETS:
        raise UsageError(f"the target is {to!r}; expected one of {', '.join(TARGETS)}.")
    target = TARGETS[to]
    precision = quantize or target.precisions[0]
    if precision not in target.precisions:
        raise UsageError(
            f"{to} has no precision {precision!r}; expected one of {', '.join(target.precisions)}."
        )
    facts, config = read_facts(model), read_config(model)
    check_identity(model, facts, config)
    width = _dim(to, dim, config.hidden_size if to == "gguf" else facts.dim or config.hidden_size)
    tokenizer = load_tokenizer(model / "tokenizer.json")
    with _new_folder(out) as folder:
        job = Job(model, folder, config, facts, width, precision)
        found = sample(tokenizer, facts.max_length, job.prefix, texts)
        target.write(job)
        with target.open(job) as opened:
            parity = _compared(job, target, opened, tokenizer, found)
        written = {
            "schema_version": SCHEMA_VERSION,
            "f2llm_version": __version__,
            "runtime": target.runtime,
            "identity": facts.identity,
            "dim": width,
            "precision": precision,
            "eos_id": facts.eos_id,
            "max_length": facts.max_length,
            "matryoshka_sizes": [size for size in facts.matryoshka_sizes if size <= width],
            "query_prefix": job.prefix if target.like_the_model else "",
            "parity": asdict(parity),
        }
        write_text(folder / "README.md", readme(to, written, parity))
        write_json(folder / FACTS, written)
    return parity


def _compared(job: Job, target: Target, opened: Opened, tokenizer: Tokenizer, found: Sample) -> Parity:
    asked = found.prompted(job.prefix)
    embedder = Embedder(job.model)
    dim = job.dim if target.like_the_model else None

    def side(encode: Encode, texts: list[str], runtime: str, precision: str, megabytes: float) -> Side:
        return Side(encode, texts, sum(count_tokens(tokenizer, texts)), runtime, precision, megabytes)

    weights = sum(map(megabytes, weight_files(job.model)))
    return measured(
        side(lambda some: embedder.encode(some, dim=dim), asked, "f2llm", "f32", weights),
        side(
            opened.encode,
            asked if target.like_the_model else found.texts,
            opened.runtime,
            job.precision,
            megabytes(job.folder),
        ),
        found.pairs,
        same_space=target.like_the_model,
        note=opened.note,
    )


def _dim(to: str, dim: int | None, width: int) -> int:
    if dim is None:
        return min(width, DEFAULT_DIM) if to == "static" else width
    if not 1 <= dim <= width:
        raise UsageError(f"dim is {dim}; this model gives 1 to {width}.")
    if to == "gguf" and dim != width:
        raise UsageError(
            f"dim is {dim}, but a GGUF file gives all {width}; leave it out, and cut and normalise the vectors that "
            "llama.cpp gives."
        )
    return dim


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; on success it is synced and takes the name, else it goes away."""
    if out.exists() and not (out / FACTS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is no export of f2llm; give another name, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        whole.chmod(0o755)  # mkdtemp gives 0700; the folder is to be shared
        yield whole
        _sync(whole)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.replace(out, old)
            os.replace(whole, out)
            shutil.rmtree(old)
        else:
            os.replace(whole, out)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    sync_folder(out.parent)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


# --- what differs between targets


def _write_onnx(job: Job) -> None:
    linear = {"f32": float_linear, "int8": int8_linear, "int8-weights": int8_weight_linear}[job.precision]
    write_onnx(job.model, job.folder, job.config, dim=job.dim, linear=linear)
    _copy_tokenizer(job)


def _write_openvino(job: Job) -> None:
    write_openvino(job.model, job.folder, job.config, dim=job.dim, precision=job.precision)
    _copy_tokenizer(job)


def _copy_tokenizer(job: Job) -> None:
    for name in COPIED:
        shutil.copyfile(job.model / name, job.folder / name)


def _gguf(job: Job) -> Path:
    return job.folder / f"model-{job.precision}.gguf"


def _opened(runtime: str, encode: Encode) -> AbstractContextManager[Opened]:
    return nullcontext(Opened(encode, runtime))


@contextmanager
def _open_gguf(job: Job) -> Iterator[Opened]:
    with ExitStack() as stack:
        try:
            encode = stack.enter_context(llama_cpp_encode(_gguf(job), job.facts.max_length))
            encode(["."])  # loads the file, or fails to
            opened = Opened(encode, "llama.cpp")
        except F2Error as error:
            encode = encode_read_back(_gguf(job), job.model, job.config, job.facts)
            note = f"llama.cpp has not computed these: {error}"
            opened = Opened(encode, "f2llm, weights read back", note)
        yield opened


TARGETS = {
    "onnx": Target(
        "ONNX Runtime",
        ("f32", "int8", "int8-weights"),
        _write_onnx,
        lambda job: _opened("ONNX Runtime", onnx_encode(job.folder, job.facts.max_length)),
    ),
    "openvino": Target(
        "OpenVINO",
        ("f32", "f16", "int8"),
        _write_openvino,
        lambda job: _opened("OpenVINO", openvino_encode(job.folder, job.facts.max_length)),
    ),
    "gguf": Target(
        "llama.cpp",
        ("f16", "f32", "q8_0"),
        lambda job: write_gguf(job.model, _gguf(job), job.config, job.facts, job.precision),
        _open_gguf,
    ),
    "static": Target(
        "sentence-transformers",
        ("f32",),
        lambda job: write_static(load_model(job.model), job.folder, job.dim),
        lambda job: _opened("NumPy", static_encode(job.folder)),
        like_the_model=False,
    ),
}
