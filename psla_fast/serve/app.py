"""The web application: its page, and its answers as JSON."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from psla_fast.serve.guard import Guard, Hosts
from psla_fast.serve.limits import Limits, Refusal
from psla_fast.serve.tagging import Desk
from psla_fast.serve.uploads import Upload, receive_upload
from psla_fast.tagger import Tagger

PAGE = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "chart.js": "text/javascript",
    "sound.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
RETRY_SECONDS = 5

log = logging.getLogger("psla_fast.serve")


class Queue:
    """Recordings on their way: `parallel` are worked on, `queue` wait, one more is refused."""

    def __init__(self, desk: Desk) -> None:
        """Start the threads in which recordings are decoded and scored."""
        self.desk, self.limits = desk, desk.limits
        self.num_taken = self.num_running = 0
        self._turns = asyncio.Semaphore(self.limits.parallel)
        self._pool = ThreadPoolExecutor(self.limits.parallel, "tag")

    async def answer(self, request: Request) -> bytes:
        """Receive a request's file and tag it when it is its turn: JSON. Raises Refusal, ClientDisconnect."""
        if self.num_taken >= self.limits.parallel + self.limits.queue:
            raise Refusal(503, "The server is busy with other recordings. Try again in a few seconds.")
        self.num_taken += 1
        try:
            upload = await receive_upload(request, self.limits)
            try:
                await self._turns.acquire()
            except BaseException:
                upload.file.close()
                raise
            try:
                return await self._run(request, upload)
            finally:
                self._turns.release()
        finally:
            self.num_taken -= 1

    async def _run(self, request: Request, upload: Upload) -> bytes:
        if await request.is_disconnected():
            upload.file.close()
            raise ClientDisconnect
        with_picture = request.query_params.get("picture") == "1"
        loop = asyncio.get_running_loop()
        self.num_running += 1
        try:  # the thread closes the file: it may go on when this is cancelled
            return await loop.run_in_executor(self._pool, self.desk.answer, upload, with_picture)
        finally:
            self.num_running -= 1

    def close(self) -> None:
        """Begin nothing more; what runs is left to end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def build_app(tagger: Tagger, limits: Limits, hosts: Hosts) -> FastAPI:
    """Build the application around a tagger, to be run once, by any ASGI server.

    GET / is the page; /health, /api/about and /api/classes tell of the server; POST /api/tag takes a
    recording. The model tags a second of noise first, so that no visitor waits for what is loaded late.
    """
    desk = Desk(tagger, limits)
    desk.warm_up()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.queue = Queue(desk)
        yield
        app.state.queue.close()

    app = FastAPI(title="psla_fast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.desk = desk
    app.add_middleware(Guard, hosts=hosts)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    for name, kind in PAGE.items():
        path = "/" if name == "index.html" else f"/{name}"
        app.add_route(path, _give((resources.files("psla_fast.serve") / "page" / name).read_bytes(), kind))
    app.add_route("/api/about", _give_json(_about(desk)))
    app.add_route("/api/classes", _give_json(_list_classes(tagger)))
    app.add_route("/health", _health)
    app.add_route("/api/tag", _tag, methods=["POST"])
    return app


async def _tag(request: Request) -> Response:
    queue: Queue = request.app.state.queue
    try:
        return Response(await queue.answer(request), media_type="application/json")
    except ClientDisconnect:
        return _error(400, "The upload was broken off.")  # nobody reads it
    except asyncio.CancelledError:  # the server's end
        return _error(503, "The server is ending. Try again later.")
    except Refusal as refusal:
        return _error(refusal.status, str(refusal))


async def _health(request: Request) -> Response:
    queue: Queue = request.app.state.queue
    waiting = queue.num_taken - queue.num_running
    return JSONResponse({"status": "ok", "running": queue.num_running, "waiting": waiting})


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{error.detail}. The page is at /.")


async def _answer_fault(request: Request, error: Exception) -> Response:
    """Answer what is a fault of ours; its traceback goes to the log."""
    return _error(500, "The server failed; its log says why.")


def _error(status: int, sentence: str) -> Response:
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
    return JSONResponse({"error": sentence}, status, headers | {"cache-control": "no-store"})


def _give(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def give(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return give


def _give_json(content: Any) -> Callable[[Request], Awaitable[Response]]:
    return _give(json.dumps(content).encode(), "application/json")


def _about(desk: Desk) -> dict[str, Any]:
    card, limits = desk.tagger.card, desk.limits
    return {
        "model": card.model.name,
        "num_classes": len(card.classes),
        "sample_rate": desk.tagger.sample_rate,
        "clip_seconds": round(card.input.clip_frames * card.fbank.frame_shift_ms / 1000, 2),
        "has_timeline": desk.has_timeline,
        "has_labels": desk.tagger.thresholds is not None,
        "max_mb": limits.max_mb,
        "max_seconds": limits.max_seconds,
    }


def _list_classes(tagger: Tagger) -> list[dict[str, Any]]:
    classes = tagger.classes
    return [
        {"index": index, "mid": mid, "name": name}
        for index, (mid, name) in enumerate(zip(classes.mids, classes.names, strict=True))
    ]
