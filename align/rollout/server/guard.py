"""The lock on a server's door: vLLM's own guards `/v1` and `/inference` only, and leaves weights and workers open."""

import hashlib
import os
import secrets
from typing import Any

from align.config.server_key import VLLM_KEY_VARIABLE


class KeyGuard:
    """ASGI middleware: without `Authorization: Bearer KEY` there is no answer to any path but 401."""

    def __init__(self, app: Any):
        self.app = app
        self.digest = hashlib.sha256(f"Bearer {os.environ[VLLM_KEY_VARIABLE]}".encode()).digest()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if secrets.compare_digest(hashlib.sha256(given).digest(), self.digest):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"this server needs its key"})
