"""Connections of `p3b serve` that say nothing: closed after a while, and the first to go where there are too many.

uvicorn waits for the first request of a connection as long as it takes. So whoever opens connections and sends nothing, or a
header one byte a minute, would hold as many as the operating system allows, and nobody else would get one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol of a connection, which must bring a request in time; `guarded` sets the limits.

    Attributes:
        seconds: until the header of a request is there whole, from the moment the connection opens or its last answer is sent.
        most: connections that are open at a time. One too many takes the place of the one that has waited longest.
    """

    seconds: float
    most: int
    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.most:
            silent = [each for each in self.connections if isinstance(each, GuardedProtocol) and each.waiting is not None]
            min(silent, key=GuardedProtocol.deadline).dismiss(
                503, "The server has too many connections. Try again in a moment."
            )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def deadline(self) -> float:
        """When it is dismissed, by the loop's clock; never while a request is answered."""
        return float("inf") if self.waiting is None else self.waiting.when()

    def dismiss(self, status: int, words: str) -> None:
        """Say why, and close."""
        self._relax()
        self.connections.discard(self)
        if not self.transport.is_closing():
            body = json.dumps({"error": words}).encode()
            head = (
                f"HTTP/1.1 {status} ",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
            )
            self.transport.write("\r\n".join((*head, "", "")).encode() + body)
            self.transport.close()

    def _watch(self) -> None:
        """Count the time that no request is there; bytes of one that is not whole yet do not begin it anew."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._relax()
        elif self.waiting is None:
            words = f"No request arrived within {self.seconds:g} seconds."
            self.waiting = self.loop.call_later(self.seconds, self.dismiss, 408, words)

    def _relax(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


def guarded(seconds: float, most: int) -> type[GuardedProtocol]:
    """The protocol with these limits, as uvicorn takes it."""
    limits: dict[str, Any] = {"seconds": seconds, "most": most}
    return type("GuardedProtocol", (GuardedProtocol,), limits)
