"""A model to start training from: any Qwen3 folder or hub model, read so that nothing about it is guessed in silence.

Folders differ in what they say and where: `load_base` looks in a fixed order for the token that ends a text, for the
longest text and for the instruction, appends EOS inside the tokenizer, and refuses what this decoder would compute
differently. What no file tells of, `f2llm.model.sanity` looks for.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, read_object
from f2llm.model.decoder import DecoderConfig
from f2llm.model.folder import (
    FACTS,
    WEIGHTS,
    WEIGHTS_INDEX,
    Model,
    ModelFacts,
    check_identity,
    identity_hash,
    load_decoder,
    open_weights,
    read_config,
    read_facts,
    weight_files,
)
from f2llm.model.prompts import TEMPLATE
from f2llm.model.tokenizer import append_eos
from f2llm.progress import say
from f2llm.recipe_fields import HUB_NAME
from f2llm.tokenizer_file import load_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
HUB_FILES = [  # no pickles, no code, no copies in other formats
    FACTS,
    "config.json",
    "golden.json",  # vectors that `f2llm verify` compares with
    "*/config.json",  # of sentence-transformers' modules
    "config_sentence_transformers.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    "model-*.safetensors",
]
# Modules of sentence-transformers that a model of ours has too; each other one would be lost.
MODULES = ("Transformer", "Pooling", "Normalize")
# Qwen3-Embedding has no space behind "Query:", F2LLM-v2 has one.
TEMPLATES = (TEMPLATE, TEMPLATE.rstrip())


@dataclass(frozen=True)
class Base:
    """A model to start from, but for its weights, which stay in its folder."""

    folder: Path
    config: DecoderConfig
    tokenizer: Tokenizer
    facts: ModelFacts


def load_base(source: str | Path) -> Model:
    """Read a model to train from: a folder of ours, another Qwen3 folder, or a model of the hub.

    Args:
        source: a folder, or `owner/name` or `owner/name@revision` of the Hugging Face hub where no such folder is.

    Returns:
        The model, its weights in float32. Its tokenizer appends EOS by itself. For a folder that is not ours,
        `facts.identity` is the hash of its weight files, its settings, and the tokenizer with that EOS.

    Raises F2Error, in one sentence, for a folder that computes vectors in another way than our decoder (another
    architecture, attention to later tokens, another pooling than of the last token, further trained modules), that
    does not tell which token ends a text, or that is incomplete; UsageError if there is no such model.
    """
    folder = model_folder(str(source))
    with ThreadPoolExecutor(1) as pool:
        decoder = pool.submit(load_decoder, folder)  # while the tokenizer is read and files are hashed
        base = read_base(folder)
        return Model(decoder.result(), base.tokenizer, base.facts)


def read_base(source: str | Path) -> Base:
    """`load_base` without the weights, of which nothing but shapes and hashes is taken."""
    folder = model_folder(str(source))
    if (folder / FACTS).is_file():
        facts, config = read_facts(folder), read_config(folder)
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(check_identity, folder, facts, config)
            tokenizer = load_tokenizer(folder / "tokenizer.json")
            checked.result()
        return Base(folder, config, tokenizer, facts)
    _refuse_other_attention(folder)
    _refuse_other_modules(folder)
    config = read_config(folder)
    with open_weights(folder, config):
        pass  # what is missing or of another shape is told before anything else
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise F2Error(
            f"{folder}: tokenizer.json has a token {last}, but the embedding table has {config.vocab_size} rows; "
            "the files are not of the same model."
        )
    eos_id = _end_with_eos(folder, tokenizer)
    instruction, template = _prompt(folder)
    content = tokenizer.to_str(pretty=False).encode()
    facts = ModelFacts(
        eos_id,
        _max_length(folder, config),
        _matryoshka_sizes(folder, config),
        instruction,
        template,
        identity=identity_hash(weight_files(folder), config, content, template),
    )
    return Base(folder, config, tokenizer, facts)


def model_folder(source: str) -> Path:
    """The folder itself, or the one in the hub's cache where the model now is."""
    if Path(source).is_dir():
        return Path(source)
    hub_id = HUB_NAME.fullmatch(source)
    if Path(source).exists() or not hub_id:
        raise UsageError(
            f"{source} is not a folder; give that of a model, or the owner/name of one on the hub."
        )
    # Slow to import, and needed here alone.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            hub_id["name"], revision=hub_id["revision"], allow_patterns=HUB_FILES
        )
    except errors.GatedRepoError:
        raise UsageError(
            f"{source} is a model of the hub that asks for an agreement; accept it on the model's page and log in "
            "with `hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise UsageError(
            f"{source} is neither a folder here nor a model (with that revision) on the hub; correct the name."
        ) from None
    except Exception as error:  # a broken connection comes as the error of whichever client the library has
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the network's
        reason = str(error).strip().splitlines() or [""]
        raise F2Error(
            f"{source} is not a folder here, and the hub cannot be reached ({type(error).__name__}: {reason[0]}); "
            "mend the connection, or give the folder of a copy."
        ) from error
    return Path(folder)


# --- What would be computed differently


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that a folder need not have."""
    return read_object(path) if path.is_file() else {}


def _refuse_other_attention(folder: Path) -> None:
    path = folder / "config.json"
    values = read_object(path)
    transformer = _transformer_settings(folder)
    values |= transformer.get("config_args") or transformer.get("config_kwargs") or {}
    if values.get("is_causal") is False or values.get("use_bidirectional_attention"):
        raise F2Error(
            f"{path} asks for attention to later tokens (is_causal, use_bidirectional_attention), but the decoder "
            "is causal; use another model."
        )
    if "auto_map" in values:
        raise F2Error(
            f"{path} names code of its own (auto_map), which may compute other vectors than Qwen3 and is never run; "
            "use another model."
        )


def _transformer_settings(folder: Path) -> dict[str, Any]:
    return _read(folder / "sentence_bert_config.json")


def _refuse_other_modules(folder: Path) -> None:
    for kind, path in _modules(folder):
        if kind.rpartition(".")[2] not in MODULES or not kind.startswith("sentence_transformers."):
            raise F2Error(
                f"{folder}/modules.json has the module {kind}, which would be lost; expected {', '.join(MODULES)} "
                "only; use another model."
            )
        if kind.endswith(".Pooling"):
            _refuse_other_pooling(folder / path / "config.json")
    if _transformer_settings(folder).get("do_lower_case"):
        raise F2Error(
            f"{folder}/sentence_bert_config.json has do_lower_case, which tokenizer.json does not do; use another "
            "model."
        )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of each module of sentence-transformers."""
    path = folder / "modules.json"
    if not path.is_file():
        return [("sentence_transformers.models.Pooling", "1_Pooling")]  # where there is one, it is there
    try:
        return [(module["type"], module["path"]) for module in read_json(path)]
    except (KeyError, TypeError):
        raise F2Error(f"{path} is not a list of modules; copy the folder again.") from None


def _refuse_other_pooling(path: Path) -> None:
    values = _read(path)
    if not values:
        return
    # Newer files name the mode (or several, whose vectors are put side by side), older have a flag for each.
    modes = values.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, chosen in values.items()
        if name.startswith("pooling_mode_") and chosen is True
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if modes != ["lasttoken"]:
        raise F2Error(
            f"{path} asks for pooling of {' and '.join(modes) or 'the mean'}, but the decoder gives the last "
            "token's vector (lasttoken); use another model."
        )


# --- EOS


def _end_with_eos(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the token that ends every text; makes the tokenizer append it if it does not.

    Evidence, in this order; the first that is there decides:

    1. tokenizer.json appends a token (Qwen3-Embedding: <|endoftext|>, whatever the other files say).
    2. Something asks for `add_eos_token` (F2LLM-v2): the `eos_token` of tokenizer_config.json.
    3. Nothing asks for any (a language model, in whose training nothing was appended): the same `eos_token`, which
       ended the texts it saw.
    4. `eos_token_id` of config.json, then of generation_config.json.

    In the last two cases the choice is ours, and is told.
    """
    encoded = tokenizer.encode("a")
    if encoded.special_tokens_mask[-1:] == [1]:
        return encoded.ids[-1]
    for name, token in _eos_evidence(folder):
        eos = token if isinstance(token, str) else tokenizer.id_to_token(token)
        number = None if eos is None else tokenizer.token_to_id(eos)
        if eos is None or number is None:
            raise F2Error(
                f"{folder}/{name} says that {token!r} ends a text, but tokenizer.json has no such token; "
                "the files are not of the same model."
            )
        _append_eos(tokenizer, eos)
        if name != TOKENIZER_CONFIG or not _asks_for_eos(folder):
            say(f"{folder} appends no token to a text; {eos} ({number}), after {name}, is appended as EOS.")
        return number
    raise F2Error(
        f"{folder} does not tell which token ends a text: tokenizer.json appends none, tokenizer_config.json has no "
        "eos_token, config.json no eos_token_id; write the eos_token it was trained with into tokenizer_config.json."
    )


def _eos_evidence(folder: Path) -> Iterator[tuple[str, str | int]]:
    """Files that name a token as EOS, as text or as number."""
    token = _read(folder / TOKENIZER_CONFIG).get("eos_token")
    if isinstance(token, dict):  # older files say more of it than its text
        token = token.get("content")
    if token is not None:
        yield TOKENIZER_CONFIG, token
    for name in ("config.json", "generation_config.json"):
        number = _read(folder / name).get("eos_token_id")
        if isinstance(number, list):  # of several, a chat model names the one that ends an answer first
            number = next(iter(number), None)
        if number is not None:
            yield name, number


def _asks_for_eos(folder: Path) -> bool:
    transformer = _transformer_settings(folder)
    arguments = transformer.get("tokenizer_args") or transformer.get("processor_kwargs") or {}
    return any(values.get("add_eos_token") for values in (arguments, _read(folder / TOKENIZER_CONFIG)))


def _append_eos(tokenizer: Tokenizer, eos: str) -> None:
    """Append EOS behind whatever the tokenizer does to a finished text already."""
    before = tokenizer.post_processor
    nothing_added = not tokenizer.encode("").ids
    append_eos(tokenizer, eos)
    if before is not None and not (isinstance(before, processors.TemplateProcessing) and nothing_added):
        tokenizer.post_processor = processors.Sequence([before, tokenizer.post_processor])


# --- The other facts


def _prompt(folder: Path) -> tuple[str, str]:
    """Instruction and template of the folder's query prompt."""
    path = folder / "config_sentence_transformers.json"
    prompt = (_read(path).get("prompts") or {}).get("query") or ""
    for template in TEMPLATES:
        before, after = template.split("{instruction}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt.removeprefix(before).removesuffix(after), template
    if prompt:
        say(f"{path} has the query prompt {prompt!r}, which is not like {TEMPLATE!r}; it is left out.")
    return "", TEMPLATE


def _max_length(folder: Path, config: DecoderConfig) -> int:
    """The smallest of the limits that the folder states; tokenizers state 10^30 where they know of none."""
    stated = [
        _transformer_settings(folder).get("max_seq_length"),
        _read(folder / TOKENIZER_CONFIG).get("model_max_length"),
        config.max_position_embeddings,
    ]
    return int(min(limit for limit in stated if limit and limit > 1))


def _matryoshka_sizes(folder: Path, config: DecoderConfig) -> list[int]:
    """The sizes that config.json says it was trained for; the full width alone if it says nothing."""
    stated = _read(folder / "config.json").get("matryoshka_dimensions") or []
    return sorted({size for size in stated if 0 < size < config.hidden_size} | {config.hidden_size})
