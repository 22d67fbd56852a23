"""Keeps a question from waiting for an answer that it will never hear.

A tab hears its answers on one stream, which the server closes after the last. If it hears that a new question is
accepted before it hears of the close, it takes the old stream for that of the new question, and waits for ever. So the
word that a question is accepted is sent a moment later; its answer is worked on meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

MOMENT = 0.1  # seconds


class LaterJoins:
    """ASGI middleware around Gradio."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def later(message: Any) -> None:
            if message["type"] == "http.response.start":
                await asyncio.sleep(MOMENT)
            await send(message)

        is_join = str(scope.get("path", "")).rstrip("/").endswith("/queue/join")
        await self._app(scope, receive, later if is_join else send)
