"""A report that is always current: a page of a local server, rendered whenever it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hjepa_engine.errors import ConfigError, one_line
from hjepa_engine.report.page import render
from hjepa_engine.report.reading import read_run

#: Seconds between two looks, while the run goes on.
REFRESH = 10


def make_server(run: Path, others: Sequence[Path] = (), port: int = 0) -> ThreadingHTTPServer:
    """A server of the report on a run, which only this machine can reach; ``serve_forever`` begins it.

    Args:
        run: its folder.
        others: folders of runs to compare it with.
        port: where it listens; 0: any that is free.

    Raises:
        ConfigError: there is no such run, or the port is taken.
    """
    for path in (run, *others):
        read_run(path)

    class Report(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page as it is now."""
            # Another name is that of a web page, which makes a browser ask for it here (DNS rebinding).
            if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
                self.send_error(403)
                return
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            try:
                data, *more = [read_run(path) for path in (run, *others)]
                page, code = render(data, more, refresh=None if data.state == "done" else REFRESH), 200
            except Exception as error:  # a run that has been removed meanwhile, say
                page, code = one_line(error), 500
            content = page.encode("utf-8", "replace")
            self.send_response(code)
            self.send_header("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with suppress(ConnectionError):  # of a browser that has left
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing of requests."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Report)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be listened on: {getattr(error, 'strerror', None) or error}"
        ) from error
