"""TEI's routes to tokens and back: /tokenize and /decode."""

from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from f2llm.serve.errors import ApiError, TEIError, described
from f2llm.serve.inputs import Body, IdArrays, PromptFields, TextOrTexts, check_count, prefix_of
from f2llm.serve.vectors import in_thread_if_long, rooms
from f2llm.text import clean

router = APIRouter(tags=["TEI"], responses=described(TEIError))


class TokenizeRequest(PromptFields):
    """Texts to tokenise."""

    inputs: TextOrTexts
    add_special_tokens: bool = True
    model: str | None = Field(None, description="Needed where several models are served.")


class Token(BaseModel):
    """A token and the characters it stands for, prompt included; specials stand for none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class DecodeRequest(Body):
    """Token ids to read."""

    ids: IdArrays
    skip_special_tokens: bool = True
    model: str | None = Field(None, description="Needed where several models are served.")


@router.post("/tokenize", response_model=list[list[Token]])
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The tokens of texts, as the model sees them."""
    served = rooms(request).models.pick(body.model)
    check_count(body.inputs, "inputs")
    prompt = body.prompt()

    def tokens() -> bytes:
        # `prepare` would refuse long texts, which may be just what somebody wants to look into.
        prefix = prefix_of(served.embedder, prompt, body.instruction)
        texts = [clean(prefix) + clean(text) for text in body.inputs]
        encoded = served.embedder.tokenizer.encode_batch(texts, add_special_tokens=body.add_special_tokens)
        pairs = zip(texts, encoded, strict=True)
        return orjson.dumps([_tokens(text, one) for text, one in pairs])

    content = await in_thread_if_long(request, sum(map(len, body.inputs)), tokens)
    return Response(content, media_type="application/json")


@router.post("/decode", response_model=list[str])
async def decode(request: Request, body: DecodeRequest) -> Response:
    """The texts of token ids."""
    served = rooms(request).models.pick(body.model)
    check_count(body.ids, "ids")
    tokenizer = served.embedder.tokenizer
    known = range(tokenizer.get_vocab_size())
    if any(token not in known for ids in body.ids for token in ids):
        raise ApiError(
            "invalid", f"`ids` must be from 0 to {len(known) - 1}; others are no tokens.", field="ids"
        )
    content = await in_thread_if_long(
        request,
        sum(map(len, body.ids)),
        lambda: orjson.dumps(tokenizer.decode_batch(body.ids, skip_special_tokens=body.skip_special_tokens)),
    )
    return Response(content, media_type="application/json")


def _tokens(text: str, encoded: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": name if special else text[start:stop],
            "special": bool(special),
            "start": None if special else start,
            "stop": None if special else stop,
        }
        for token, name, special, (start, stop) in zip(
            encoded.ids, encoded.tokens, encoded.special_tokens_mask, encoded.offsets, strict=True
        )
    ]
