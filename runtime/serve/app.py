"""The routes: OpenAI's, vLLM's for tokens, and what a cluster asks a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..language_model import RequestOptions
from .admission import Limits, Pool
from .answers import answer
from .conversation import read_messages
from .engine_client import EngineClient
from .errors import ApiError
from .fields import Fields, parse_body
from .messages import EngineSetup
from .metrics import Metrics
from .middleware import Gate, body_of
from .openai_request import read_chat, read_completions
from .openai_response import ChatForm, CompletionForm
from .page import page_response
from .served_model import ServedModel

__all__ = ["ServeConfig", "create_app"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a server serves, and to whom.

    Attributes:
        setups: One for each engine.
        limits: How much is taken in.
        name: What clients call the model; None is the name of its folder.
        template_file: Used instead of the checkpoint's chat template.
        api_keys: Who may come in; none lets everybody.
        cors_origins: Pages of other sites that may call from a browser.
        max_body_bytes: Of a request.
        shutdown_timeout_s: What runs gets so long to end.
        starts_loaded: Whether the application starts once the model is loaded, for hosts that don't
            ask /health; else it answers 503 until then.
    """

    setups: Sequence[EngineSetup]
    limits: Limits = Limits()
    name: str | None = None
    template_file: Path | None = None
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    shutdown_timeout_s: float = 30.0
    starts_loaded: bool = False


def create_app(config: ServeConfig) -> Starlette:
    """Makes the application; its engines start and end with it, and /health tells of them.

    `app.state.server` is the Server.

    Args:
        config: See ServeConfig.

    Returns:
        An ASGI application.
    """
    server = Server(config)
    middleware = [Middleware(Gate, keys=config.api_keys)]
    if config.cors_origins:  # outside: a browser asks first, without its key
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.load())
        try:
            if config.starts_loaded:
                await loading
                if server.problem is not None:
                    raise server.problem
            yield
        finally:
            loading.cancel()
            await server.stop()

    post, get = partial(Route, methods=["POST"]), partial(Route, methods=["GET"])
    app = Starlette(
        routes=[
            post("/v1/completions", server.completions),
            post("/v1/chat/completions", server.chat),
            post("/v1/embeddings", server.embeddings),
            get("/v1/models", server.models),
            get("/v1/models/{name:path}", server.one_model),
            post("/tokenize", server.tokenize),
            post("/detokenize", server.detokenize),
            get("/tokenizer_info", server.tokenizer_info),
            get("/health", server.health),
            get("/metrics", server.metrics),
            get("/", server.page),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_plain},
        lifespan=lifespan,
    )
    app.state.server = server
    return app


class Server:
    """The routes' functions, and what they share.

    Attributes:
        pool: The engines.
        model: What the front knows of their model; None until the first one is ready.
        loaded: Set once the engines are ready, or can't be.
        problem: Why they can't be.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.model: ServedModel | None = None
        self.loaded = asyncio.Event()
        self.problem: ValueError | OSError | None = None
        self._config = config
        self._metrics = Metrics()
        self._page = page_response()
        engines = [EngineClient(setup) for setup in config.setups]
        self.pool = Pool(engines, config.limits, self._metrics)
        self._metrics.watch(
            "num_requests_running", "Requests with a slot.", lambda: self.pool.num_running
        )
        self._metrics.watch(
            "num_requests_waiting", "Requests without one.", lambda: self.pool.num_waiting
        )

    async def load(self) -> None:
        """Starts the engines, one after the other, and waits until they are ready."""
        try:
            for engine in self.pool.engines:
                ready = await engine.start()
                if self.model is None:
                    self.model = ServedModel.load(
                        ready,
                        name=self._config.name,
                        template_file=self._config.template_file,
                        created_s=int(time.time()),
                    )
        except (ValueError, OSError) as error:
            logger.error("the model can't be loaded: %s", error)
            self.problem = error
        self.loaded.set()

    def drain(self) -> None:
        """Takes nothing in any more."""
        self.pool.draining = True

    async def stop(self) -> None:
        """Ends the engines."""
        for engine in self.pool.engines:
            await engine.stop()

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        fields, model = await self._open(request)
        asked = await to_thread.run_sync(read_completions, fields, model, self._options(request))
        form = CompletionForm(asked=asked, model=model)
        return await answer(request, asked, form, self.pool.open(asked.requests))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields, model = await self._open(request)
        asked = await to_thread.run_sync(read_chat, fields, model, self._options(request))
        form = ChatForm(asked=asked, model=model)
        return await answer(request, asked, form, self.pool.open(asked.requests))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings, which this model doesn't have."""
        raise ApiError(400, "embeddings are not supported: this server generates text")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        card, name = self._card(), request.path_params["name"]
        if name != card["id"]:
            message = f"there is no model {name!r:.100}; this is {card['id']}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(card)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a prompt, or messages."""
        fields, model = await self._open(request)
        if fields.get("messages") is not None:
            ids = await to_thread.run_sync(model.render, *read_messages(fields))
        else:
            text = fields.text("prompt")
            if text is None:
                raise fields.error("prompt", "a text")
            bos = fields.get("add_special_tokens") is None or fields.flag("add_special_tokens")
            # A special token's name alone is that token: so clients learn the ids of BOS and EOS.
            special = text in model.tokenizer.special_names
            try:
                ids = model.tokenizer.encode(text, bos=bos, special=special)
            except ValueError as error:
                raise ApiError(400, str(error), param="prompt") from None
        about = {"tokens": ids, "count": len(ids), "max_model_len": model.shape.max_seq_len}
        return JSONResponse(about)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        fields, model = await self._open(request)
        try:
            text = model.tokenizer.decode(fields.integers("tokens"))
        except ValueError as error:
            raise ApiError(400, str(error), param="tokens") from None
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info."""
        model = self._ready_model()
        tokenizer, template = model.tokenizer, model.template
        eos_id = next(iter(tokenizer.eos_ids), None)
        return JSONResponse(
            {
                "tokenizer_class": "llamac",
                "bos_token": None
                if tokenizer.bos_id is None
                else model.token_text(tokenizer.bos_id),
                "eos_token": None if eos_id is None else model.token_text(eos_id),
                "pad_token": None,
                "chat_template": None if isinstance(template, str) else template.source,
                "vocab_size": tokenizer.vocab_size,
            }
        )

    async def health(self, request: Request) -> Response:
        """GET /health: 200 where a request could be taken in."""
        status = self.pool.status if self.model is not None else "loading"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def page(self, request: Request) -> Response:
        """GET /: the chat page."""
        return self._page

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _open(self, request: Request) -> tuple[Fields, ServedModel]:
        body = await body_of(request, self._config.max_body_bytes)
        return parse_body(body), self._ready_model()

    def _ready_model(self) -> ServedModel:
        if self.model is None:
            retry = {"Retry-After": "5"}
            raise ApiError(503, "the model is loading; try again", code="loading", headers=retry)
        return self.model

    def _options(self, request: Request) -> RequestOptions:
        """What the server adds to every request; rows are shared by requests of one key alone."""
        return RequestOptions(
            timeout_s=self._config.limits.request_timeout_s, prefix_scope=request.state.client
        )

    def _card(self) -> dict[str, Any]:
        model = self._ready_model()
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_s,
            "owned_by": "llamac",
            "max_model_len": model.shape.max_seq_len,
        }


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _refuse_plain(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's form too."""
    assert isinstance(error, HTTPException)
    api_error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(api_error.body(), error.status_code, headers=error.headers)
