"""`fbclip serve`: a page to watch a pipeline in a browser, and a REST interface. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs

import anyio
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import ValidationError

import fbclip
from fbclip.errors import FBClipError, ImageError, SizeError
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.serving.access import LOGIN, PROBES, Access, Guard, problem
from fbclip.runtime.serving.feed import Feed, Update
from fbclip.runtime.serving.schemas import EventBody, HealthBody, Problem, ScoredBody, StatusBody, ThresholdBody
from fbclip.runtime.serving.uploads import InTurn, UploadLimits, Uploads, read_body

if TYPE_CHECKING:
    from fbclip.runtime.live.pipeline import Pipeline
    from fbclip.runtime.live.records import Record
    from fbclip.runtime.live.sinks.metrics import Prometheus

WEB = Path(__file__).parent / "web"
FRAME_INTERVAL = 1 / 15  # seconds between two pictures for one viewer; more would only cost
STATUS_INTERVAL = 1.0  # seconds between two messages where nothing happens
PATIENCE = 60.0  # seconds for a viewer to say that it has drawn a picture
NO_TEXT, LOGGED_OUT, TRY_AGAIN_LATER = 1003, 1008, 1013  # WebSocket's codes
SMALL_BODY = 4096  # bytes of what is no image
HANGS_S = 120.0  # of one run of the model: on the slowest board that was measured it is over in 10
OK = "ok"
BINARY = {"type": "string", "format": "binary"}


class Site:
    """What the requests of one server share.

    Args:
        predictor: of the pipeline and for uploads, which are inspected as its frames are; its backend is an `InTurn`.
        feed: the sink of the pipeline that this page shows.
        pipeline: None for uploads alone.
    """

    def __init__(
        self, predictor: Predictor, access: Access, feed: Feed, pipeline: Pipeline | None, limits: UploadLimits
    ) -> None:
        self.predictor = predictor
        self.feed = feed
        self.pipeline = pipeline
        self.access = access
        self.limits = limits
        self.uploads = Uploads(predictor, limits)
        self.viewers = 0

    @property
    def health(self) -> str:
        """ "ok", or what a restart of the server may cure. A camera that is away is no such thing."""
        backend = self.predictor.backend
        return "the model hangs" if isinstance(backend, InTurn) and backend.busy_s > HANGS_S else OK

    @property
    def readiness(self) -> str:
        """ "ok", or why nothing is inspected now; told to strangers, so it names nothing."""
        if self.health != OK:
            return self.health
        if self.uploads.fault:
            return "the model fails"
        state = self.pipeline.state if self.pipeline else "live"
        return OK if state == "live" else f"the source is {state}"

    def status(self) -> dict[str, Any]:
        memory, calibration = self.predictor.memory, self.predictor.calibration
        return {
            "version": fbclip.__version__,
            "time": time.time(),
            "model": {
                "name": self.predictor.bundle.name,
                "sha256": self.predictor.bundle.sha256,
                "device": self.predictor.backend.device,
                "precision": self.predictor.precision,
                "image_size": self.predictor.bundle.manifest.image_size,
                "memory": {
                    "name": memory.name,
                    "good_parts": len(memory.about.references),
                    "mode": memory.about.mode,
                }
                if memory
                else None,
                "calibration": {
                    "made": calibration.made,
                    "good_images": calibration.count,
                    "false_alarm_rate": calibration.false_alarm_rate,
                }
                if calibration
                else None,
            },
            "threshold": self.predictor.threshold,
            "login": self.access.needs_token,
            "uploads": self.uploads.under_way,
            "viewers": self.viewers,
            "fault": self.uploads.fault,
            "pipeline": self.pipeline.status().to_dict() if self.pipeline else None,
        }

    def set_threshold(self, threshold: float) -> None:
        """For the camera and for uploads, from the next image on."""
        self.predictor.set_threshold(threshold)


def create_app(
    predictor: Predictor,
    access: Access,
    feed: Feed | None = None,
    pipeline: Pipeline | None = None,
    metrics: Prometheus | None = None,
    limits: UploadLimits | None = None,
) -> FastAPI:
    """The ASGI application: page, REST interface, WebSocket.

    Args:
        predictor: of the pipeline and for uploads; its backend is an `InTurn` where there is a pipeline.
        access: who may connect.
        feed: a sink of the pipeline.
        pipeline: None for uploads alone.
        metrics: a sink of the pipeline, for /metrics.
    """
    site = Site(predictor, access, feed or Feed(), pipeline, limits or UploadLimits())
    app = FastAPI(
        title="fbclip",
        version=fbclip.__version__,
        summary="Find defects on objects never seen before.",
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere; /api is ours
        redoc_url=None,
        redirect_slashes=False,  # to where the request's Host says
        responses={status: {"model": Problem} for status in ((400, 401, 403) if access.needs_token else (400, 403))},
    )
    app.add_middleware(Guard, access=access)
    _explain_errors(app)
    _add_pages(app, site)
    _add_rest(app, site)
    _add_live(app, site)
    if metrics:
        _add_metrics(app, metrics)
    return app


def _explain_errors(app: FastAPI) -> None:
    """Every error is {"detail": one line}."""

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        return problem(422, f"{where}: {first['msg']}")

    @app.exception_handler(FBClipError)
    async def _(request: Request, error: FBClipError) -> Response:
        status = 413 if isinstance(error, SizeError) else 422 if isinstance(error, ImageError) else 503
        return problem(status, str(error))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return problem(500, "the server failed at this request; its log says where")


def _add_pages(app: FastAPI, site: Site) -> None:
    """The files of the page, read once; the login where a token is needed."""
    pages = {
        "/": ("index.html", "text/html"),
        "/api": ("api.html", "text/html"),
        "/app.js": ("app.js", "text/javascript"),
        "/api.js": ("api.js", "text/javascript"),
        "/style.css": ("style.css", "text/css"),
        "/icon.svg": ("icon.svg", "image/svg+xml"),
    }

    def page(content: bytes, media_type: str) -> Callable[[], Response]:
        return lambda: Response(content, media_type=media_type)

    for path, (name, media_type) in pages.items():
        app.get(path, include_in_schema=False)(page((WEB / name).read_bytes(), media_type))
    if not site.access.needs_token:
        return
    style = (WEB / "style.css").read_text("utf-8")
    form = (WEB / "login.html").read_text("utf-8").replace("/* style */", style)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; frame-ancestors 'none'"

    def login_page(error: str = "", status: int = 200) -> Response:
        return HTMLResponse(form.replace("<!-- error -->", error), status, {"Content-Security-Policy": policy})

    @app.get(LOGIN, include_in_schema=False)
    def login() -> Response:
        return login_page()

    @app.post(LOGIN, include_in_schema=False)
    async def enter(request: Request) -> Response:
        body = await read_body(request, SMALL_BODY, site.limits.upload_seconds)
        token = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        if not await site.access.accepts(token, request):
            return login_page("That is not the token.", 403)
        response = RedirectResponse("/", 303)
        site.access.admit(response, request)
        return response

    @app.post("/logout", include_in_schema=False)
    async def leave(request: Request) -> Response:
        response = RedirectResponse(LOGIN, 303)
        site.access.dismiss(response, request)
        return response


def _add_rest(app: FastAPI, site: Site) -> None:
    def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": Problem} for status in statuses}

    @app.post(
        "/v1/predict",
        response_model=ScoredBody,
        responses=refusals(408, 413, 415, 422, 429, 503),
        openapi_extra=_body({f"image/{kind}": BINARY for kind in ("jpeg", "png", "bmp", "tiff", "webp")}),
    )
    async def predict(
        request: Request,
        overlay: Annotated[bool, Query(description="Add a picture of the verdict.")] = False,
        map: Annotated[bool, Query(description="Add the anomaly map.")] = False,
    ) -> dict[str, Any]:
        """Score the image in the body."""
        with site.uploads.place():
            return await site.uploads.score(await site.uploads.read(request), overlay, map)

    @app.get("/v1/status", response_model=StatusBody)
    def status() -> dict[str, Any]:
        """Model, threshold, camera, rates and ages."""
        return site.status()

    @app.put(
        "/v1/threshold",
        responses=refusals(408, 413, 422),
        openapi_extra=_body({"application/json": ThresholdBody.model_json_schema()}),
    )
    async def set_threshold(request: Request) -> ThresholdBody:
        """Set the threshold until the server stops."""
        body = await read_body(request, SMALL_BODY, site.limits.upload_seconds)  # FastAPI would take it whole
        try:
            wanted = ThresholdBody.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        site.set_threshold(wanted.threshold)
        return wanted

    @app.get("/v1/events", response_model=list[EventBody])
    def events() -> list[dict[str, Any]]:
        """The last alarms, newest first."""
        return [alarm.to_dict() for alarm in site.feed.alarms]

    @app.get(
        "/v1/events/{id}/picture",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {"schema": BINARY}}}, **refusals(404, 422)},
    )
    def picture(id: int) -> Response:
        """The overlay of the frame that raised an alarm."""
        for alarm in site.feed.alarms:
            if alarm.id == id:
                return Response(alarm.picture, media_type="image/jpeg")
        raise HTTPException(404, f"there is no event {id}; /v1/events lists those that are kept")

    def told(state: str) -> Response:
        return JSONResponse({"status": state}, 200 if state == OK else 503)

    # neither waits for a thread, which requests that take long may all hold
    @app.get("/healthz", response_model=HealthBody, responses={503: {"model": HealthBody}})
    async def healthz() -> Response:
        """Whether the server works; 503 says what a restart may cure. Needs no token."""
        return told(site.health)

    @app.get("/readyz", response_model=HealthBody, responses={503: {"model": HealthBody}})
    async def readyz() -> Response:
        """Whether what comes is inspected; 503 says why not, like a source that is lost. Needs no token."""
        return told(site.readiness)

    for path, probe in zip(PROBES, (healthz, readyz), strict=True):  # some programs that watch ask for the head alone
        app.head(path, include_in_schema=False)(probe)


def _body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The description of a body that the handler reads itself."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": s} for kind, s in schemas.items()}}}


def _add_metrics(app: FastAPI, metrics: Prometheus) -> None:
    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def scrape() -> Response:
        """For Prometheus."""
        text, media_type = metrics.render()
        return Response(text, media_type=media_type)


def _add_live(app: FastAPI, site: Site) -> None:
    @app.websocket("/v1/live")
    async def live(websocket: WebSocket) -> None:
        """News as JSON, followed by a picture where "picture" says so; the viewer answers each with any text.

        A viewer is sent the newest picture once it has drawn the last one: a slow one sees fewer, never older ones.
        """
        await websocket.accept()
        if site.viewers >= site.limits.viewers:
            return await websocket.close(TRY_AGAIN_LATER, "too many viewers")
        site.viewers += 1
        try:
            await websocket.close(await _send_news(websocket, site))
        except (WebSocketDisconnect, TimeoutError):
            pass  # it left, or fell asleep
        finally:
            site.viewers -= 1


async def _send_news(websocket: WebSocket, site: Site) -> int:
    """Until the viewer does what ends it; the code to close with."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    position, shown, status_due = 0, None, 0.0
    with site.feed.listening(lambda: loop.call_soon_threadsafe(news.set)):
        while site.access.may_enter(websocket):  # its login may end meanwhile
            news.clear()
            latest = site.feed.latest
            has_picture = latest is not None and latest is not shown
            update = site.feed.since(position)
            message = _message(update, latest)
            if has_status := time.monotonic() >= status_due:
                status_due = time.monotonic() + STATUS_INTERVAL
                message["status"] = await run_sync(site.status)
            if has_picture or has_status or update.position != position:
                jpeg = await run_sync(site.feed.picture, latest) if has_picture and latest else b""
                if latest:
                    message["age_ms"] = round((time.monotonic() - latest.frame.captured) * 1e3, 1)
                await websocket.send_text(json.dumps({**message, "picture": has_picture}, allow_nan=False))
                if has_picture:
                    await websocket.send_bytes(jpeg)
                with anyio.fail_after(PATIENCE):
                    answer = await websocket.receive()
                if answer["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(answer["code"])
                if answer.get("text") is None:
                    return NO_TEXT
                position, shown = update.position, latest
            await asyncio.sleep(FRAME_INTERVAL)
            with anyio.move_on_after(STATUS_INTERVAL):
                await news.wait()
    return LOGGED_OUT


def _message(update: Update, latest: Record | None) -> dict[str, Any]:
    """What the page is told; `result` is of the picture, `scores` hold what came between two pictures too."""
    result = None
    if latest:
        prediction = latest.prediction
        result = {
            "source": latest.frame.name,
            "score": prediction.score,
            "is_anomalous": prediction.is_anomalous,
            "verdict": prediction.verdict,
            "unusable": prediction.unusable,
            "alarm": latest.alarm,
            "regions": len(prediction.regions),
        }
    return {
        "time": time.time(),
        "result": result,
        "scores": update.scores,
        "notices": [notice.to_dict() for notice in update.notices],
        "events": [alarm.to_dict() for alarm in update.alarms],
    }
