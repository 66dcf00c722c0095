"""Golden vectors: what a model gave where it was made, shipped beside it, so that any engine can be held against them.

golden.json holds texts, the prompts that stood in front of them, and vectors of full size as base64 of little-endian
float32. Engines are asked for the texts with the prompt written out, which every one of them can do.

Shape suffixes: N texts, D dims.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error
from f2llm.files import read_object, write_json
from f2llm.verify.computed import Target, Vectors, cosines
from f2llm.verify.findings import Finding, failed, passed

GOLDEN = "golden.json"
SCHEMA_VERSION = 1
DTYPE = "<f4"
TEXTS_AT_ONCE = 8  # servers take 10 to 2,048
# Farther than half precision moves a vector, nearer than a lost EOS, prompt or mask does.
LARGEST_DISTANCE = 1e-3

_SENTENCES = (
    "The ferry leaves at noon and reaches the island before dark.",
    "Ma grand-mère faisait sécher la lavande au-dessus du four.",
    "Im Winter frieren die Seen so fest zu, dass Lastwagen darüber fahren.",
    "El puente nuevo une los dos barrios que el río separaba.",
    "Старый фонарщик знал каждую улицу по звуку шагов.",
    "老师把黑板擦得干干净净，然后打开了窗户。",
    "雨が上がると、子どもたちは水たまりを飛び越えて帰った。",
    "시장 골목에서는 아침마다 갓 구운 빵 냄새가 난다.",
    "يجمع الصيادون شباكهم قبل أن تشتد الريح.",
    "किसान ने बारिश से पहले ही फसल काट ली।",
    "แม่ค้าจัดผลไม้เป็นกองเล็ก ๆ ก่อนตลาดเปิด",
    "Watoto walipanda miti kando ya barabara ya shule.",
    "המאפייה בפינת הרחוב נפתחת לפני הזריחה.",
    "ጠዋት ላይ ቡና በእያንዳንዱ ቤት ይፈላል።",
)
GOLDEN_TEXTS = (
    "",
    "a",
    "水",
    "👩‍🚀🌋 → 🏝️",
    "def area(r): return 3.14159 * r ** 2",
    *_SENTENCES,
    " ".join(_SENTENCES),
)


def write_golden(path: Path, embedder: Embedder) -> int:
    """Write a model's golden vectors; returns the number of texts, without those too long for the model."""
    prompts = {"document": ""} | ({"query": prefix} if (prefix := embedder.prefix("query", None)) else {})
    longest = max(prompts.values(), key=len)
    lengths = map(len, embedder.token_ids([longest + text for text in GOLDEN_TEXTS]))
    texts = [text for text, n in zip(GOLDEN_TEXTS, lengths, strict=True) if n <= embedder.max_length]
    found = {name: embedder.encode([prompt + text for text in texts]) for name, prompt in prompts.items()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "identity": embedder.identity,
        "dtype": "float32",
        "prompts": prompts,
        "texts": texts,
        "vectors": {name: list(map(_packed, vectors_ND)) for name, vectors_ND in found.items()},
    }
    write_json(path, content)
    return len(texts)


def read_golden(path: Path) -> dict[str, Any]:
    """The content of a golden.json, vectors as float32 [N, D] by the name of the prompt; F2Error for a broken one."""
    content = read_object(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise F2Error(
            f"{path} has schema_version {content.get('schema_version')!r}, expected {SCHEMA_VERSION}; make it anew "
            "with `f2llm verify FOLDER --write-golden`."
        )
    try:
        texts, prompts = list(content["texts"]), dict(content["prompts"])
        found = {name: np.stack(list(map(_unpacked, content["vectors"][name]))) for name in prompts}
        assert all(len(vectors_ND) == len(texts) for vectors_ND in found.values())
        return {"identity": str(content["identity"]), "texts": texts, "prompts": prompts, "vectors": found}
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise F2Error(
            f"{path} is not a file of golden vectors ({error!r}); make it anew with "
            "`f2llm verify FOLDER --write-golden`."
        ) from None


def golden_check(path: Path, *, empty_texts: bool) -> Callable[[Target], Finding]:
    """A check against the vectors in `path`.

    Args:
        empty_texts: whether the target takes an empty text, which servers need not.
    """

    def golden(target: Target) -> Finding:
        content = read_golden(path)
        said = target.identity
        if said is not None and said != content["identity"]:
            return failed(
                f"{path.name} is of the model {content['identity'][:16]}, but this is {said[:16]}.",
                "Take the golden vectors of this model, or make them anew with `f2llm verify FOLDER --write-golden`.",
            )
        known, written = target.query_prompt, content["prompts"].get("query", "")
        if known is not None and known != written:
            return failed(
                f"{path.name} was made with {written!r} in front of queries, the target has {known!r}.",
                "Give queries the prompt that the model was trained with.",
            )
        kept = [n for n, text in enumerate(content["texts"]) if text or empty_texts]
        distance, worst = 0.0, ""
        for name, prompt in content["prompts"].items():
            texts = [content["texts"][n] for n in kept]
            golden_ND = content["vectors"][name][kept]
            got_ND = _in_parts(target, [prompt + text for text in texts])
            if got_ND.shape != golden_ND.shape:
                return failed(
                    f"golden vectors have {golden_ND.shape[1]} dimensions, the target's {got_ND.shape[1]}.",
                    "Take the golden vectors of this model.",
                )
            distance_N = np.nan_to_num(1 - cosines(got_ND, golden_ND), nan=2.0)
            if float(distance_N.max()) >= distance:
                distance, worst = float(distance_N.max()), texts[int(distance_N.argmax())]
        said_of_all = f"largest cosine distance {max(distance, 0.0):.1e} over {len(kept)} texts"
        if distance > LARGEST_DISTANCE:
            return failed(
                f"{said_of_all}, more than {LARGEST_DISTANCE}, at {worst[:40]!r}.",
                "Compare EOS, prompt and pooling with the model's folder, then the engine's precision.",
            )
        return passed(said_of_all)

    return golden


def _in_parts(target: Target, texts: list[str]) -> Vectors:
    parts = [target.embed(texts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(texts), TEXTS_AT_ONCE)]
    return np.concatenate(parts)


def _packed(vector_D: Vectors) -> str:
    return base64.b64encode(vector_D.astype(DTYPE).tobytes()).decode()


def _unpacked(text: str) -> Vectors:
    return np.frombuffer(base64.b64decode(text, validate=True), DTYPE).astype(np.float32)
