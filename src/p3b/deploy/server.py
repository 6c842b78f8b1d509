"""The web page of `p3b serve`, on Starlette and uvicorn: one page, and one address that takes the bytes of an image.

    GET /            the page
    POST /predict    an image file as the body; JSON: labels, probabilities and times of each model, or {"error": ...} in words

What anybody may send is bounded: bytes of a body, pixels of an image, images that are held at a time, images that are decoded
at a time, seconds that a body may take. An image too many is turned away (503) and may come again. Nothing is written to disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jinja2
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from p3b.deploy.side_by_side import Looked, SideBySide
from p3b.errors import DataError

_SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""The page loads nothing from elsewhere, and no other page shows it inside itself."""


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        file_bytes: of an image file.
        pixels: of an image.
        images: held at a time: being received, waiting or computed.
        decoders: images that are decoded at a time.
        seconds: that a body may take to arrive.
    """

    file_bytes: int = 20_000_000
    pixels: int = 50_000_000
    images: int = 16
    decoders: int = 2
    seconds: float = 30.0


def build_app(looker: SideBySide, limits: Limits, *, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The server's application.

    Args:
        looker: the models.
        limits: what it takes.
        hosts: names by which it may be called; a page of elsewhere cannot reach it by another (DNS rebinding).
    """
    page = _page(looker, limits)
    desk = _Desk(looker, limits)

    async def show(_request: Request) -> Response:
        return HTMLResponse(page, headers=_SAFE)

    return Starlette(
        routes=[Route("/", show), Route("/predict", desk.predict, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


class _Desk:
    """Takes images, as many at a time as the limits say, and turns the others away."""

    def __init__(self, looker: SideBySide, limits: Limits) -> None:
        self._looker, self._limits = looker, limits
        self._held = 0
        self._decoders: CapacityLimiter | None = None  # born in the loop that it belongs to

    async def predict(self, request: Request) -> Response:
        if self._held >= self._limits.images:
            with suppress(asyncio.TimeoutError, ClientDisconnect):
                await self._read(request, keep=False)
            return _refusal(503, "The server is busy with other images. Try again in a moment.", {"Retry-After": "1"})
        self._held += 1
        try:
            return await self._answer(request)
        finally:
            self._held -= 1

    async def _answer(self, request: Request) -> Response:
        self._decoders = self._decoders or CapacityLimiter(self._limits.decoders)
        try:
            content = await self._read(request)
        except asyncio.TimeoutError:
            return _refusal(408, f"The image took longer than {self._limits.seconds:g} seconds to arrive.")
        except ClientDisconnect:
            return _refusal(400, "The image did not arrive whole.")
        if content is None:
            megabytes = self._limits.file_bytes / 1e6
            return _refusal(413, f"The file is larger than the {megabytes:g} MB that are allowed.")
        if not content:
            return _refusal(400, "No image was sent: expected the bytes of an image file as the body of the request.")
        try:
            found = await to_thread.run_sync(self._looker, content, limiter=self._decoders)
        except DataError as error:
            return _refusal(422, f"The image cannot be read: {str(error)[:300]}.")
        return JSONResponse(_plain(found), headers=_SAFE)

    async def _read(self, request: Request, *, keep: bool = True) -> bytes | None:
        """The body, or None where it is too large; `keep=False` lets it go by, so that who sent it gets to read the answer."""
        if int(request.headers.get("content-length", 0)) > self._limits.file_bytes:
            return None
        parts: list[bytes] = []
        size = 0

        async def receive() -> bool:
            nonlocal size
            async for part in request.stream():
                size += len(part)
                if size > self._limits.file_bytes:
                    return False
                if keep:
                    parts.append(part)
            return True

        whole = await asyncio.wait_for(receive(), self._limits.seconds)
        return b"".join(parts) if whole else None


def _plain(found: Looked) -> dict[str, Any]:
    """The answer as JSON values, labels as `p3b predict --format jsonl` writes them."""
    answers = [
        {
            "model": answer.model,
            "labels": [{"label": label.name, "probability": round(label.probability, 6)} for label in answer.labels],
            "milliseconds": round(answer.milliseconds, 3),
        }
        for answer in found.answers
    ]
    sizes = {"width": found.width, "height": found.height, "preparation_ms": round(found.preparation_ms, 3)}
    return {**sizes, "answers": answers}


def _refusal(status: int, words: str, more: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": words}, status_code=status, headers={**_SAFE, **(more or {})})


def _page(looker: SideBySide, limits: Limits) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("p3b.deploy", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("serve.html.j2").render(
        models=looker.models, megabytes=limits.file_bytes / 1e6, megapixels=limits.pixels / 1e6
    )
