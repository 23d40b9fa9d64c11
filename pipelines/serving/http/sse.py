"""Answers of the chat endpoint in OpenAI's format, whole or as server-sent events."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pipelines.serving.contract.errors import ApiError, internal_error
from pipelines.serving.contract.wire import Piece
from pipelines.serving.http.admission import RequestContext

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


def chat_completion(context: RequestContext, model: str, piece: Piece) -> dict[str, Any]:
    """Body of a whole answer (`chat.completion`)."""
    message = {"role": "assistant", "content": piece.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish_reason}
    return {
        "id": f"chatcmpl-{context.record.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage(piece.prompt_tokens, piece.completion_tokens),
    }


def usage(prompt_tokens: int, completion_tokens: int = 0) -> dict[str, int]:
    """Token counts in OpenAI's format."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def events(
    context: RequestContext, model: str, first: Piece, rest: AsyncGenerator[Piece, None], *, with_usage: bool
) -> AsyncIterator[str]:
    """Yield the chunks of a streamed answer, its usage if wanted, and `[DONE]`; on a failure, an error event.

    Args:
        context: Context of the request, whose deadline holds for the whole stream.
        model: Name of the model in the answer.
        first: First piece, which the handler has awaited, so that earlier failures get their own status code.
        rest: Further pieces.
        with_usage: Value of `stream_options.include_usage`.
    """
    head = {
        "id": f"chatcmpl-{context.record.id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    piece = first
    yield _chunk(head, {"role": "assistant", "content": ""}, None, with_usage)
    try:
        while True:
            context.record.prompt_tokens = piece.prompt_tokens
            context.record.completion_tokens = piece.completion_tokens
            if piece.text:
                yield _chunk(head, {"content": piece.text}, None, with_usage)
            if piece.finish_reason is not None:
                break
            async with asyncio.timeout_at(context.deadline_s):
                piece = await anext(rest)
    except TimeoutError:
        yield _error(context, ApiError(504, "timeout", "the answer took too long and was cut off; ask for less"))
        return
    except ApiError as error:
        yield _error(context, error)
        return
    except Exception:
        logger.exception("request %s failed in the middle of its answer", context.record.id)
        yield _error(context, internal_error())
        return
    yield _chunk(head, {}, piece.finish_reason, with_usage)
    if with_usage:
        counts = usage(piece.prompt_tokens, piece.completion_tokens)
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': counts})}\n\n"
    context.record.status = 200
    yield DONE


def close_with(rest: AsyncGenerator[Piece, None], stack: contextlib.AsyncExitStack) -> contextlib.AsyncExitStack:
    """Add the cancellation of the generation to the callbacks of a stream's end."""
    stack.push_async_callback(rest.aclose)
    return stack


def _chunk(head: dict[str, Any], delta: dict[str, str], finish_reason: str | None, with_usage: bool) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    extra = {"usage": None} if with_usage else {}
    return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"


def _error(context: RequestContext, error: ApiError) -> str:
    context.record.status, context.record.error = error.status, error.code
    return f"data: {json.dumps(error.refusal.body())}\n\n"
