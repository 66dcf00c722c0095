"""A language model in this process, by transformers: slow, but it needs no server.

Requests are answered one at a time, each from its own seed, so the same requests get the same answers. For many rows
serve the model with a program made for that (vLLM, llama.cpp, ...) and give its url.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from f2llm.errors import UsageError
from f2llm.synthetic.client import Complete, Reply
from f2llm.synthetic.journal import Tokens


@asynccontextmanager
async def local_model(path: str, *, temperature: float, max_tokens: int) -> AsyncIterator[Complete]:
    """The language model in a folder or of a hub name; UsageError where it cannot be loaded."""
    answer = _load(path, temperature, max_tokens)
    turn = asyncio.Lock()

    async def complete(text: str, schema: dict[str, Any], seed: int) -> Reply:
        async with turn:
            return await asyncio.to_thread(answer, text, seed)

    yield complete


def _load(path: str, temperature: float, max_tokens: int) -> Any:
    """A function from a prompt and a seed to a Reply."""
    import torch

    try:
        import transformers
    except ImportError:
        raise UsageError(
            f"{path}: a model in this process needs transformers; run `pip install 'f2llm[synthetic]'`, or give the "
            "url of a server."
        ) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"{path} is no language model that transformers can load ({first}).") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(text: str, seed: int) -> Reply:
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        prompt = prompt.to(model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            whole = model.generate(**prompt, max_new_tokens=max_tokens, **sampling)[0]
        read = prompt["input_ids"].shape[1]
        written = whole[read:]
        used = Tokens(read, len(written))
        is_cut = len(written) == max_tokens
        return Reply(tokenizer.decode(written, skip_special_tokens=True), used, path, is_cut)

    return answer
