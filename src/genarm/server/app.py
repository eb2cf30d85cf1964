"""The application: routes, the page, and what stands in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

import genarm
from genarm.engine.options import MOST_WISHES
from genarm.server import metrics
from genarm.server.bodies import schemas
from genarm.server.chat import chat_routes
from genarm.server.completions import completion_routes
from genarm.server.errors import ENGINE_PAUSE, ERRORS, ApiError, add_error_handlers
from genarm.server.guidance import no_wishes
from genarm.server.job import Service
from genarm.server.replies import Health, Model, Models, Preset, Reward, Rewards, WishLimits
from genarm.server.schema import LONGEST_WISH
from genarm.server.security import protected

PAGE = Path(__file__).parent / "page"


def build_app(
    service: Service,
    *,
    keys: frozenset[str] = frozenset(),
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
) -> ASGIApp:
    """Everything that answers.

    Args:
        service: what the answers come from.
        keys: API keys; without any, everybody may ask.
        origins: web pages of these may ask from a browser.
        hosts: names beside the loopback ones that requests may call this server by; None allows any.
    """
    app = FastAPI(title="genarm", version=genarm.__version__, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.include_router(chat_routes(service))
    app.include_router(completion_routes(service))
    app.include_router(_listing_routes(service))
    app.include_router(_state_routes(service))
    _add_page(app)
    _add_forms(app)
    return protected(app, service.metrics, keys=keys, origins=origins, hosts=hosts)


def _listing_routes(service: Service) -> APIRouter:
    router = APIRouter(responses={401: ERRORS[401]})
    names = service.names

    def described(model_id: str) -> Model:
        return Model(id=model_id, object="model", created=service.started, owned_by="genarm")

    @router.get("/v1/models")
    async def models() -> Models:
        """The model, and the model with the weights of each preset."""
        return Models(object="list", data=[described(model_id) for model_id in names.ids])

    @router.get("/v1/models/{model:path}", responses={404: ERRORS[404]})
    async def model(model: str) -> Model:
        """One of them; any name that a request may have for `model` is one."""
        names.resolve(model, None)
        return described(model)

    @router.get("/v1/rewards")
    async def rewards() -> Rewards:
        """The rewards, the weights that they take, the presets, and which wishes requests may have."""
        data = [
            Reward(
                id=reward.name,
                default_weight=reward.default,
                minimum=-names.largest,
                maximum=names.largest,
                description=reward.description,
                difference=reward.difference,
                wish=reward.wish,
            )
            for reward in names.rewards
        ]
        presets = [
            Preset(name=name, weights=names.preset(name), max_kl=names.preset_budget(name)) for name in names.presets
        ]
        limits = WishLimits(most=MOST_WISHES, characters=LONGEST_WISH, minimum=-names.largest, maximum=names.largest)
        return Rewards(
            object="list",
            model=names.model,
            data=data,
            presets=presets,
            return_rewards=service.backend.explains,
            request_wishes=None if no_wishes(service) else limits,
        )

    return router


def _state_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        """Whether the process answers at all."""
        return Health(status="ok")

    @router.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> Health:
        """Whether requests are taken."""
        state = service.backend.state
        if state != "ok":
            message = f"the engine is not running: {state}"
            raise ApiError(503, message, kind="server_error", code="not_ready", retry_after=ENGINE_PAUSE)
        return Health(status=state)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)

    return router


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        index = PAGE / "index.html"
        if not index.is_file():
            return JSONResponse({"models": "/v1/models", "document": "/openapi.json"})
        return FileResponse(index, headers={"Cache-Control": "no-cache"})

    app.mount("/assets", _Assets(directory=PAGE, check_dir=False))


class _Assets(StaticFiles):
    """The page's files, asked for again whenever the page is: an installed update shows at once."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_forms(app: FastAPI) -> None:
    """Bodies are read by ourselves (`bodies`), so FastAPI does not know what they are."""
    usual = app.openapi

    @cache
    def document() -> dict[str, Any]:
        schema = usual()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        found = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            found.pop(name, None)
        found.update(schemas())
        return schema

    app.openapi = document  # type: ignore[method-assign]
