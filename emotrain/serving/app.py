"""The server's HTTP interface, with FastAPI: what is asked goes to the worker, what comes back is
written as JSON or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import emotrain
from emotrain.data.tokenizer import TextTokenizer
from emotrain.errors import RunError, UserError
from emotrain.files import json_text
from emotrain.generation.loading import encode
from emotrain.generation.sequence import CANCELLED, ERROR, Delta
from emotrain.serving.chat import ChatTemplate, NoTemplateError
from emotrain.serving.completions import (
    Answer,
    TokenTexts,
    characters_of,
    prompts_of,
    requests_of,
)
from emotrain.serving.gate import error_body
from emotrain.serving.metrics import ServerMetrics
from emotrain.serving.models import ForbiddenError, ModelTable, UnknownModelError
from emotrain.serving.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadSubsetBody,
    SamplingBody,
    TokenizeBody,
    UnloadSubsetBody,
)
from emotrain.serving.worker import Ticket, TooManyRequestsError, Worker

log = logging.getLogger("emotrain")

LONG_TEXT = 1 << 13
"""Characters of prompts that take their time to encode, and other requests must not wait for it:
they go to another thread, which costs more than a shorter text does."""
SEND_S = 5.0
"""How long the last of a stream may take to be sent, after the time of its request."""
CLIENT_GONE = 499
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request cannot be; says why"},
    401: {"description": "the key is missing or wrong"},
    403: {"description": "the server was not started to do that"},
    404: {"description": "no such model"},
    408: {"description": "the body came too slowly"},
    413: {"description": "the body is too large"},
    422: {"description": "the model has no chat template"},
    429: {"description": "too many sequences wait; see Retry-After"},
    500: {"description": "a defect of the server"},
    503: {
        "description": "what it needs cannot be read, it takes too long, or the server is ending"
    },
}
STATUS = (
    (UnknownModelError, 404),
    (ForbiddenError, 403),
    (NoTemplateError, 422),
    (TooManyRequestsError, 429),
    (UserError, 400),
)


class UnavailableError(RunError):
    """The server cannot do it now."""


class DefectError(Exception):
    """A step failed, and not for want of a file."""


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class Service:
    """What the handlers share."""

    worker: Worker
    table: ModelTable
    tokenizer: TextTokenizer
    template: ChatTemplate
    metrics: ServerMetrics
    seconds: float
    """Longest that a request may take."""
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))


def build_app(service: Service) -> FastAPI:
    """The application; the worker runs from its start to its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)

    app = FastAPI(
        title="emotrain", version=emotrain.__version__, lifespan=lifespan, responses=ERRORS
    )
    app.state.service = service
    _add_completions(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    _add_errors(app)
    return app


# ---- routes


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continue texts, or lists of token ids."""
        if characters_of(body) < LONG_TEXT:
            prompts = prompts_of(body, service.tokenizer)
        else:
            prompts = await asyncio.to_thread(prompts_of, body, service.tokenizer)
        return await _answer(service, request, body, prompts, body.max_tokens)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Continue a conversation, where the model's tokenizer has a template for them."""
        prompt = await asyncio.to_thread(service.template.tokens, body.messages)
        most = body.max_completion_tokens
        if most is None:
            most = body.max_tokens
        if most is None:
            most = max(service.worker.engine.limits.sequence_tokens - len(prompt), 1)
        return await _answer(service, request, body, [prompt], most)


def _add_models(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "emotrain",
            "max_model_len": service.worker.engine.limits.sequence_tokens,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The full model, its subsets, and a quarter of the experts chosen by each prompt."""
        names = service.table.names()
        if service.worker.engine.model.expert_banks():
            names.append("auto:0.25")
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        service.table.find(name)
        return described(name)

    @app.post("/v1/load_subset")
    async def load_subset(body: LoadSubsetBody) -> dict[str, Any]:
        """Serve another subset of the model from now on."""
        await asyncio.to_thread(service.table.load_requested, body.subset_name, body.subset_path)
        return described(body.subset_name)

    @app.post("/v1/unload_subset")
    async def unload_subset(body: UnloadSubsetBody) -> dict[str, Any]:
        """Serve it no more. Requests that run go on."""
        service.table.unload(body.subset_name)
        return {"id": body.subset_name, "object": "model", "deleted": True}


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text."""
        if body.model is not None:
            service.table.find(body.model)
        if body.prompt == service.tokenizer.eos_token:
            # Evaluation harnesses ask so for its id. Inside of a text it is ordinary characters.
            tokens = [service.tokenizer.eos_id]
        else:
            tokens = await asyncio.to_thread(encode, service.tokenizer, body.prompt)
        most = service.worker.engine.limits.sequence_tokens
        return {"tokens": tokens, "count": len(tokens), "max_model_len": most}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What clients need to know of the tokenizer to use the two paths for it."""
        return {
            "eos_token": service.tokenizer.eos_token,
            "bos_token": None,
            "pad_token": None,
            "chat_template": service.template.source,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids."""
        if body.model is not None:
            service.table.find(body.model)
        wrong = [token for token in body.tokens if token >= service.tokenizer.vocab_size]
        if wrong:
            raise UserError(
                f"token {wrong[0]} is none of the {service.tokenizer.vocab_size} of this model"
            )
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while requests are taken."""
        return Response(status_code=200 if service.worker.alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of the program."""
        return {"version": emotrain.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def mistake(_: Request, error: UserError) -> Response:
        status = next(status for kind, status in STATUS if isinstance(error, kind))
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(error_body(_line(error), status), status, headers)

    @app.exception_handler(RunError)
    async def unavailable(_: Request, error: RunError) -> Response:
        return JSONResponse(error_body(_line(error), 503), 503, {"Retry-After": "1"})

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first, kind = error.errors()[0], request.headers.get("content-type", "")
        if first["loc"] == ("body",) and isinstance(first.get("input"), bytes):
            # The framework leaves the body of any other type as bytes.
            message = f"content-type: {kind or 'none'} is not read; send application/json"
            return JSONResponse(error_body(message, 415, "content-type"), 415)
        where = ".".join(str(part) for part in first["loc"][1:])
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(error_body(message, 400, where or None), 400)

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> Response:
        return JSONResponse(
            error_body(str(error.detail), error.status_code), error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body("the server failed; its log says why", 500), 500)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---- an answer


class EventStream(StreamingResponse):
    """Events, until a time after which nobody waits any longer for a client that reads too
    slowly."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], deadline: float, leave: Callable[[], None]
    ):
        """`leave` is called at the end, also where no event was ever asked for."""
        super().__init__(events, media_type="text/event-stream")
        self._events, self._deadline, self._leave = events, deadline, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client read its stream too slowly; it is left")
        finally:
            await self._events.aclose()
            self._leave()


async def _answer(
    service: Service,
    request: Request,
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
) -> Response:
    requests = requests_of(
        body, prompts, service.table.find(body.model), 16 if max_tokens is None else max_tokens
    )
    num_choices = body.n or 1
    if num_choices * len(requests) > service.worker.most_waiting:
        raise UserError(
            f"{num_choices * len(requests)} sequences at once are above the limit of "
            f"{service.worker.most_waiting}; send fewer prompts, or a smaller n"
        )
    deadline = time.monotonic() + service.seconds
    streams = bool(body.stream)
    ticket = await service.worker.submit(body.model, requests, num_choices, in_pieces=streams)
    service.metrics.read(body.model, sum(map(len, prompts)))
    answer = Answer(body, service.texts, service.tokenizer)
    if streams:
        events = _events(service, ticket, answer)
        return EventStream(events, deadline + SEND_S, lambda: service.worker.cancel(ticket))
    watching = asyncio.create_task(_watch(request, ticket))
    try:
        async for _ in _deltas(service, ticket):
            pass
    finally:
        watching.cancel()
    return JSONResponse(answer.whole(ticket.generations))


async def _watch(request: Request, ticket: Ticket) -> None:
    """Give a ticket up when its client goes away. (A stream is watched by its response.)"""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.give_up(ClientGoneError())


async def _deltas(
    service: Service, ticket: Ticket
) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """What is added to each sequence, until all have ended. Whoever stops reading ends them.

    Raises:
        UnavailableError: what a sequence needs cannot be read, or time is up. ClientGoneError.
    """
    open_ones = len(ticket.generations)
    too_long = UnavailableError(
        f"the answer takes more than {service.seconds:g} s; ask for fewer tokens"
    )
    late = ticket.loop.call_later(service.seconds, ticket.give_up, too_long)
    try:
        while open_ones:
            found = await ticket.read()
            for _, delta in found:
                if delta.finish_reason is not None:
                    open_ones -= 1
                    _check_end(delta)
            yield found
    finally:
        late.cancel()
        if open_ones:
            service.worker.cancel(ticket)


def _check_end(delta: Delta) -> None:
    if delta.finish_reason == ERROR:
        error = delta.generation.error
        if isinstance(error, (OSError, RunError)):
            raise UnavailableError(_line(error)) from error
        raise DefectError("the server failed; its log says why") from error
    if delta.finish_reason == CANCELLED:
        raise UnavailableError("the server is ending; ask another one")


async def _events(service: Service, ticket: Ticket, answer: Answer) -> AsyncGenerator[bytes, None]:
    counts = [0] * len(ticket.generations)
    for index in range(len(counts)):
        if (first := answer.first_chunk(index)) is not None:
            yield _event(first)
    deltas = _deltas(service, ticket)
    try:
        async for found in deltas:
            events = []
            for index, delta in found:
                counts[index] += len(delta.tokens)
                events.append(_event(answer.chunk(index, delta, counts[index])))
            yield b"".join(events)
        options = answer.body.stream_options
        if options is not None and options.include_usage:
            yield _event(answer.last_chunk(ticket.generations))
        yield b"data: [DONE]\n\n"
    except UnavailableError as error:
        # The status has been sent: the stream itself says it.
        yield _event(error_body(_line(error), 503))
    except DefectError as error:
        yield _event(error_body(_line(error), 500))
    finally:
        await deltas.aclose()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json_text(content).encode()
