"""What the files of a model folder say, each reader's share of them, before anything is computed.

Sentence-transformers takes pooling from modules.json, TEI from the flags of 1_Pooling, vLLM the sizes from config.json,
all of them EOS from tokenizer.json. So a folder that f2llm refuses to load, or loads although others load it wrongly,
is judged all the same.
"""

import torch

from f2llm.model.folder import FACTS, check_identity, open_weights, read_config, read_facts
from f2llm.model.prompts import query_prefix
from f2llm.verify.findings import Check, Finding, failed, passed, skipped
from f2llm.verify.folder_files import PROBES, Files

CUT_TO = 4  # tokens, for the question whether EOS survives
FLAG = "pooling_mode_"
# TEI 1.9.3 declares these as required (router/src/lib.rs).
FLAGS_THAT_TEI_NEEDS = (f"{FLAG}cls_token", f"{FLAG}mean_tokens")


# --- The token that is pooled


def eos_appended(files: Files) -> Finding:
    number = files.eos_id()
    if number is None:
        ends = ", ".join(sorted(map(files.token, files.endings())))
        wanted = files.named("tokenizer_config.json", "eos_token") or "the EOS it was trained with"
        return failed(
            f"tokenizer.json appends no special token: texts end in {ends}, so runtimes pool an ordinary token.",
            f"Give tokenizer.json a TemplateProcessing post-processor that appends {wanted}.",
        )
    if files.tokenizer.encode(PROBES[0]).ids[-2:-1] == [number]:
        return failed(
            f"tokenizer.json appends {files.token(number)} twice.",
            "Leave one post-processor in tokenizer.json that appends it.",
        )
    return passed(f"tokenizer.json ends every text in {files.token(number)}")


def eos_survives(files: Files) -> Finding:
    number = files.eos_id()
    if number is None:
        return skipped("tokenizer.json appends no EOS that could survive")
    files.tokenizer.enable_truncation(CUT_TO)
    try:
        lost = [text for text in PROBES if files.tokenizer.encode(text).ids[-1:] != [number]]
    finally:
        files.tokenizer.no_truncation()
    if lost:
        return failed(
            f"EOS is lost when a text is cut to {CUT_TO} tokens, so that long texts are pooled at another token.",
            "Append EOS in the post-processor of tokenizer.json, which runs after truncation, and nowhere else.",
        )
    return passed("EOS stays where a text is cut")


def eos_named(files: Files) -> Finding:
    number = files.eos_id()
    places = [(FACTS, "eos_id"), ("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")]
    named = {name: token for name, key in places if (token := files.named(name, key)) is not None}
    if number is None or not named:
        return skipped("tokenizer.json appends no EOS, or no other file names one")
    appended = files.tokenizer.id_to_token(number)
    if others := {name: token for name, token in named.items() if token != appended}:
        said = ", ".join(f"{name} says {token!r}" for name, token in others.items())
        return failed(
            f"tokenizer.json appends {files.token(number)}, but {said}: tools that append EOS by name pool another "
            "token.",
            "Name the token that the model was trained with in each file, or append that one.",
        )
    return passed(f"{', '.join(named)} name {appended!r} too")


def pad_token(files: Files) -> Finding:
    pad = files.named("tokenizer_config.json", "pad_token") or files.named("config.json", "pad_token_id")
    if pad is None:
        return failed(
            "no file names a token to pad with, so that runtimes choose one or cannot batch texts.",
            "Write a pad_token that is not EOS into tokenizer_config.json.",
        )
    if (number := files.tokenizer.token_to_id(pad)) is None:
        return failed(
            f"the pad_token {pad!r} is not in tokenizer.json.",
            "Name one of its special tokens in tokenizer_config.json.",
        )
    if number == files.eos_id():
        return failed(
            f"{pad!r} is EOS and PAD at once: what drops padding by its id drops the token that is pooled.",
            "Name another special token as pad_token in tokenizer_config.json.",
        )
    return passed(f"{pad!r} pads, EOS is another token")


def padding_side(files: Files) -> Finding:
    side = files.read("tokenizer_config.json").get("padding_side")
    if side is None:
        return skipped("tokenizer_config.json names no padding_side; readers take the right")
    if side not in ("left", "right"):
        return failed(
            f"tokenizer_config.json has padding_side {side!r}.",
            'Write "left" there, as Qwen\'s models have it.',
        )
    return passed(f"{side}, and said so in tokenizer_config.json")


# --- What sentence-transformers, TEI, vLLM and llama.cpp take from the folder


def pooling(files: Files) -> Finding:
    name, values = files.pooling
    fix = f"Make {name} say {FLAG}lasttoken: true, and false for every other mode."
    if not values:
        return failed(f"the folder has no {name}, and readers take the mean of all tokens instead.", fix)
    mode = values.get("pooling_mode")
    modes = [] if mode is None else [mode] if isinstance(mode, str) else list(mode)
    flags = [
        key.removeprefix(FLAG).removesuffix("_tokens").removesuffix("_token")
        for key, chosen in values.items()
        if key.startswith(FLAG) and chosen is True
    ]
    said = [given for given in (modes, flags) if given]
    if said and all(given == ["lasttoken"] for given in said):
        return passed(f"{name}: lasttoken, which is what is computed")
    asked = " against ".join(" and ".join(given) for given in said) or "no mode"
    return failed(f"{name} asks for {asked}, but the model computes the last token's vector.", fix)


def normalizes(files: Files) -> Finding:
    if [kind for kind, _ in files.modules][-1:] == ["Normalize"]:
        return passed("modules.json ends in Normalize")
    return failed(
        "modules.json does not end in Normalize, so that readers give vectors of any length.",
        "Add the module sentence_transformers.models.Normalize with the path 2_Normalize as the last one.",
    )


def readers(files: Files) -> Finding:
    name, values = files.pooling
    transformer = files.read("sentence_bert_config.json")
    lacks = [f"{key} of {name}" for key in FLAGS_THAT_TEI_NEEDS if key not in values]
    lacks += ["max_seq_length of sentence_bert_config.json"] if "max_seq_length" not in transformer else []
    if lacks:
        return failed(
            f"the folder lacks {', '.join(lacks)}, which TEI 1.9.3 reads as required.",
            "Write the folder in the older layout of sentence-transformers, which new readers take as well.",
        )
    width, hidden = values.get("word_embedding_dimension"), files.read("config.json").get("hidden_size")
    if width != hidden:
        return failed(
            f"{name} has word_embedding_dimension {width}, config.json hidden_size {hidden}.",
            "Write the hidden size into both.",
        )
    return passed("older and newer readers find all keys that they need")


def max_length(files: Files) -> Finding:
    stated = {
        FACTS: files.read(FACTS).get("max_length"),
        "sentence_bert_config.json": files.read("sentence_bert_config.json").get("max_seq_length"),
    }
    if (
        files.is_ours
    ):  # elsewhere it is the language model's limit, or 10^30 where the tokenizer knows of none
        stated["tokenizer_config.json"] = files.read("tokenizer_config.json").get("model_max_length")
    limits = {name: limit for name, limit in stated.items() if limit is not None}
    positions = files.read("config.json").get("max_position_embeddings")
    if not limits:
        return skipped("no file states how long a text may be")
    said = ", ".join(f"{name} {limit:,}" for name, limit in limits.items())
    if len(set(limits.values())) > 1:
        return failed(
            f"the files state different limits ({said}), so runtimes cut a text at different places.",
            "Write the length that the model was trained on into each.",
        )
    if positions is not None and max(limits.values()) > positions:
        return failed(
            f"texts may have more tokens ({said}) than config.json has positions ({positions:,}).",
            "Write the length that the model was trained on into each.",
        )
    return passed(f"all state the same limit ({said})")


def prompts_named(files: Files) -> Finding:
    prompts = files.prompts
    if files.is_ours:
        facts = read_facts(files.folder)
        wanted = query_prefix(facts.instruction, facts.template) if facts.instruction else ""
        if prompts.get("query", "") != wanted:
            return failed(
                f"config_sentence_transformers.json puts {prompts.get('query')!r} in front of queries, {FACTS} "
                f"{wanted!r}.",
                "Write the prompt that the model was trained with into both.",
            )
    if not prompts:
        return skipped("the folder names no prompts: queries and documents go in bare")
    return passed(f"named: {', '.join(f'{name} {text!r}' for name, text in prompts.items())}")


def matryoshka(files: Files) -> Finding:
    config = files.read("config.json")
    width, sizes = int(config.get("hidden_size") or 0), config.get("matryoshka_dimensions")
    trained = read_facts(files.folder).matryoshka_sizes if files.is_ours else None
    if sizes is None:
        if config.get("is_matryoshka") is True:
            return passed("config.json: is_matryoshka, so vLLM takes every size")
        if trained is None:
            return skipped(
                "config.json has neither matryoshka_dimensions nor is_matryoshka, so vLLM refuses `dimensions`; write "
                "the sizes there if the model was trained for several"
            )
        return failed(
            f"config.json does not say that the model was trained for {trained}, so vLLM refuses `dimensions`.",
            f'Write "is_matryoshka": true and "matryoshka_dimensions": {trained} into config.json.',
        )
    if trained is not None and sorted(sizes) != trained:
        return failed(
            f"config.json has matryoshka_dimensions {sizes}, the model was trained for {trained}.",
            f'Write "matryoshka_dimensions": {trained} into config.json.',
        )
    if not all(isinstance(size, int) and 0 < size <= width for size in sizes):
        return failed(
            f"config.json has matryoshka_dimensions {sizes}, but vectors have 1 to {width} dimensions.",
            "Write the sizes that the model was trained for into config.json.",
        )
    full = trained[-1] if trained else width
    if full not in sizes:
        return failed(
            f"the full size {full} is not among matryoshka_dimensions, so vLLM refuses it.",
            f"Add {full} to matryoshka_dimensions in config.json.",
        )
    return passed(f"config.json: {sizes}")


# --- Hygiene


def vocabulary(files: Files) -> Finding:
    last, rows = max(files.tokenizer.get_vocab().values()), read_config(files.folder).vocab_size
    if last >= rows:
        return failed(
            f"tokenizer.json has a token {last}, but the embedding table has {rows} rows.",
            "Copy tokenizer and weights of one and the same model.",
        )
    return passed(f"{last + 1:,} tokens, {rows:,} rows in the table")


def weights(files: Files) -> Finding:
    with open_weights(files.folder, read_config(files.folder)) as tensors:
        for name in tensors.shapes:
            tensor = tensors.read(name)
            if not bool(torch.isfinite(tensor).all()):
                broken = int((~torch.isfinite(tensor)).sum())
                return failed(
                    f"{name} has {broken:,} numbers that are not finite.", "Copy or make the weights again."
                )
        return passed(f"{len(tensors.shapes)} tensors of the shapes that config.json calls for, all finite")


def identity(files: Files) -> Finding:
    if not files.is_ours:
        return skipped(f"the folder has no {FACTS}, which would hold the model's hash")
    facts = read_facts(files.folder)
    check_identity(files.folder, facts, read_config(files.folder))
    return passed(f"{facts.identity[:16]}, as {FACTS} says")


FILE_CHECKS: list[Check[Files]] = [
    ("eos-appended", eos_appended),
    ("eos-survives-truncation", eos_survives),
    ("eos-named", eos_named),
    ("pad-token", pad_token),
    ("padding-side", padding_side),
    ("pooling", pooling),
    ("normalize-module", normalizes),
    ("readers", readers),
    ("max-length", max_length),
    ("prompts-named", prompts_named),
    ("matryoshka", matryoshka),
    ("vocabulary", vocabulary),
    ("weights", weights),
    ("identity", identity),
]
