"""Serve what `make run` built on this machine only, and print where."""
from __future__ import annotations

import functools
import http.server
import sys
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def server(folder: Path, port: int = 8000) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1, at `port` or, if that is taken, at a free one."""
    handler = functools.partial(Quiet, directory=str(folder))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError:
        return http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)


def main() -> int:
    with server(BUILD) as httpd:
        address = f"http://127.0.0.1:{httpd.server_port}"
        print(f"site    {address}/site/\nreport  {address}/report/\nCtrl-C ends", flush=True)
        try:
            httpd.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
