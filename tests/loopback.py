"""Servers on 127.0.0.1 that speak the real protocols: a file server with byte ranges, and a Hub to download from."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


@contextlib.contextmanager
def serve(handler):
    """Runs a request handler's class on a free port of 127.0.0.1 and yields the server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def file_handler(content, break_after=None, ranges=True, status=None):
    """Serves `content` under any path; the first answers break off after `break_after` bytes each."""

    class Handler(BaseHTTPRequestHandler):
        requests = []
        breaks = list(break_after or [])

        def do_GET(self):
            header = self.headers.get("Range")
            type(self).requests.append(header)
            if status is not None:
                self.send_error(status)
                return
            start = int(header.removeprefix("bytes=").rstrip("-")) if header and ranges else 0
            body = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.breaks:
                body = body[: type(self).breaks.pop(0)]
                self.wfile.write(body)
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_handler(repos):
    """Serves repositories as the Hub does to those who download.

    Args:
        repos: {"datasets/user/name" or "models/user/name": {file name: bytes}}.
    """

    class Handler(BaseHTTPRequestHandler):
        paths = []

        def _find(self):
            path = unquote(urlparse(self.path).path)
            type(self).paths.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                repo = "/".join(parts[1:4])
                return "api", repo, parts[4:]
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            return "file", f"{kind}/{parts[0]}/{parts[1]}", parts[2:]

        def _json(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _entry(self, name, content):
            return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

        def do_GET(self):
            kind, repo, rest = self._find()
            files = repos.get(repo)
            if files is None:
                self._json({"error": "Repository not found"}, 404)
            elif kind == "api" and rest[:1] in ([], ["revision"]):
                self._json({"id": repo.partition("/")[2], "sha": COMMIT, "private": False, "gated": False, "tags": [],
                            "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]})  # fmt: skip
            elif kind == "api" and rest[0] == "tree":
                prefix = "/".join(rest[2:])
                inside = {name: c for name, c in files.items() if not prefix or name.startswith(prefix + "/")}
                folders = sorted({name.rpartition("/")[0] for name in inside if "/" in name} - {prefix})
                if "recursive=true" not in self.path.lower():
                    inside = {n: c for n, c in inside.items() if "/" not in n[len(prefix) :].strip("/")}
                self._json([self._entry(n, c) for n, c in inside.items()]
                           + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders])  # fmt: skip
            elif kind == "file" and rest[0] == "resolve":
                content = files.get("/".join(rest[2:]))
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
            else:
                self._json({"error": "not served here"}, 404)

        do_HEAD = do_GET

        def do_POST(self):
            _, repo, rest = self._find()
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            files = repos.get(repo)
            if files is None or rest[:1] != ["paths-info"]:
                self._json({"error": "not served here"}, 404)
                return
            try:
                wanted = json.loads(body)["paths"]
            except json.JSONDecodeError:
                from urllib.parse import parse_qs

                wanted = parse_qs(body.decode()).get("paths", [])
            self._json([self._entry(name, files[name]) for name in wanted if name in files])

        def log_message(self, *args):
            pass

    return Handler
