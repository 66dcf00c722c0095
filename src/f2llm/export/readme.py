"""README.md of an exported folder: what it is of, and the few lines of code that use it."""

from typing import Any

from f2llm.export.parity import Parity

TEMPLATE = """# A text-embedding model for {runtime}

Made by f2llm {f2llm_version}: {precision} weights, vectors of {dim} dimensions and unit length. Facts for programs
stand in `export.json`. The model has the identity
`{identity}`.

- {prompt}
- Texts are in Unicode NFC and have at most {max_length} tokens.
- {end}

```{language}
{code}
```

## Agreement

{parity}

Measured on {texts} texts. `neighbours` is the share of a text's ten nearest that stay; the first row is the original.
"""

PADDED = """import numpy as np
import {module}
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation(<max_length>)
tokenizer.enable_padding()
model = {model}


def encode(texts):
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([text.ids for text in encoded], np.int64)
    mask = np.array([text.attention_mask for text in encoded], np.int64)
    return {run}"""

FEEDS = '{"input_ids": ids, "attention_mask": mask}'

CODE = {
    "onnx": (
        "python",
        PADDED.format(
            module="onnxruntime",
            model='onnxruntime.InferenceSession("model.onnx")',
            run=f"model.run(None, {FEEDS})[0]",
        ),
    ),
    "openvino": (
        "python",
        PADDED.format(
            module="openvino",
            model=(
                "openvino.Core().compile_model(\n"
                '    "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}\n)'
            ),
            run=f"model({FEEDS})[0]",
        ),
    ),
    "gguf": (
        "sh",
        "llama-server --model model-<precision>.gguf --embeddings --parallel 1 --ctx-size <max_length>",
    ),
    "static": (
        "python",
        'from sentence_transformers import SentenceTransformer\n\nencode = SentenceTransformer(".").encode',
    ),
}


def readme(to: str, facts: dict[str, Any], parity: Parity) -> str:
    """The text for a target; `facts` is the content of export.json."""
    language, code = CODE[to]
    prefix = facts["query_prefix"]
    return TEMPLATE.format(
        **{name: value for name, value in facts.items() if name != "parity"},
        language=language,
        code=code.replace("<max_length>", str(facts["max_length"])).replace(
            "<precision>", facts["precision"]
        ),
        prompt=f"Queries begin with `{prefix!r}`; documents are bare."
        if prefix
        else "No text needs a prompt.",
        end=(
            "A text's vector is the mean of its tokens'."
            if to == "static"
            else f"Every text ends in token {facts['eos_id']}, which the tokenizer appends; its vector is the text's."
        ),
        parity=parity.render(),
        texts=parity.texts,
    )
