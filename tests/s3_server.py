"""An S3-compatible server (moto) on loopback, as a program: prints its port and serves one request after another.

It has the faults of real stores, by name: a bucket `deaf` ignores the condition of a put; of an object `...busy` the first put
is refused as if another were under way; of an object `...lost` the first put succeeds and is answered as if it had not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class Store:
    """moto behind its faults."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.faulted: set[str] = set()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        first = environ["REQUEST_METHOD"] == "PUT" and path not in self.faulted
        if path.startswith("/deaf/"):
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if not (first and path.endswith(("busy", "lost"))):
            return self.app(environ, start_response)
        self.faulted.add(path)
        if path.endswith("lost"):
            b"".join(self.app(environ, lambda *_: None))
            start_response("500 Internal Server Error", [])
            return [b"<Error><Code>InternalError</Code></Error>"]
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start_response("409 Conflict", [])
        return [b"<Error><Code>ConditionalRequestConflict</Code></Error>"]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Store(), request_handler=MotoRequestHandler)
    print(server.server_port, flush=True)
    server.serve_forever()
