"""A Hub on 127.0.0.1 to publish to and to load from: the HTTP protocol of huggingface_hub, with faults where a test wants them.

It speaks repos/create, branch, validate-yaml, preupload, LFS batch and upload, commit, revision, tree, paths-info and
resolve. What is committed stands on a branch whole or not at all, as on the real one.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKEN = "hf_loopbackTOKENloopbackTOKEN"
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other"}


class Hub:
    """What the Hub holds and has been asked.

    Attributes:
        repos: {"models/user/name": {branch: [commit, ...]}}; a commit is {path: bytes}, the last one is what stands.
        blobs: large files that have arrived, by sha256; those of no commit are seen by nobody.
        faults: [method, pattern of the path, fault, how many times]; a fault is a status, "reset" (the connection breaks),
            "half" (it breaks in the middle of the answer), "lost" (the request is done, its answer breaks) or "slow" (the answer
            comes byte by byte).
        requests: "METHOD path" of all that was asked.
    """

    def __init__(self):
        self.repos, self.private, self.blobs, self.faults, self.requests = {}, set(), {}, [], []
        self.lock = threading.Lock()
        self.bodies = []

    def files(self, repo="models/user/name", branch="main"):
        commits = self.repos[repo][branch]
        return commits[-1] if commits else {}

    def handler(self):
        return type("Handler", (_Handler,), {"hub": self})


def check_card(content):
    """Returns what the Hub's own check would refuse in the metadata of a card."""
    match = re.match(r"^---\n(.*?)\n---\n", content, re.S)
    if not match:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    errors = []
    if data.get("license") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "")):
        errors.append('"license_name" is missing or malformed')
    languages = data.get("language", [])
    for code in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            errors.append(f'"language" {code} is no ISO 639 code')
    for key in ("base_model",):
        if key in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", data[key]):
            errors.append(f'"{key}" {data[key]} is no Hub id')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or not {"type", "name"} <= result["dataset"].keys():
                errors.append('"model-index" result lacks task, dataset or metrics')
            for metric in result["metrics"]:
                if "type" not in metric or not isinstance(metric.get("value"), int | float):
                    errors.append('"model-index" metric lacks type or value')
    return errors


def check_space(content):
    """Returns what the Hub would refuse in the metadata of a Space."""
    data = yaml.safe_load(re.match(r"^---\n(.*?)\n---\n", content, re.S)[1])
    return [f'"{key}" is missing' for key in ("title", "sdk", "sdk_version", "app_file") if not data.get(key)]


class _Handler(BaseHTTPRequestHandler):
    hub = None
    is_slow = False
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in [body[i : i + 1] for i in range(len(body))] if self.is_slow else [body]:
            self.wfile.write(piece)
            self.wfile.flush()

    def _break(self):
        self.close_connection = True
        self.connection.close()

    def _take_fault(self, path):
        for fault in self.hub.faults:
            if fault[3] > 0 and fault[0] == self.command and re.search(fault[1], path):
                fault[3] -= 1
                return fault[2]
        return None

    def _handle(self):
        url = urlparse(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.hub.bodies.append(body)
            fault = self._take_fault(path)
        self.is_slow = fault == "slow"
        if fault == "reset":
            self._break()
        elif isinstance(fault, int):
            self._answer({"error": f"fault {fault}"}, fault)
        elif fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"{")
            self._break()
        else:
            if fault == "lost":
                self._answer, answer = (lambda *args, **kwargs: None), self._answer
                self._route(path, parse_qs(url.query), body)
                self._answer = answer
                self._break()
                return
            self._route(path, parse_qs(url.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _may_write(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "Invalid username or password."}, 401)
        return False

    def _route(self, path, query, body):
        parts = path.strip("/").split("/")
        hub = self.hub
        if path == "/api/whoami-v2":
            if self._may_write():
                self._answer({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/validate-yaml":
            wanted = json.loads(body)
            errors = (check_space if wanted["repoType"] == "space" else check_card)(wanted["content"])
            self._answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)
        elif path == "/api/repos/create":
            if self._may_write():
                wanted = json.loads(body)
                kind = wanted.get("type", "model") + "s"
                name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
                prefix = "" if kind == "models" else f"{kind}/"
                url = f"http://{self.headers['Host']}/{prefix}{name}"
                exists = f"{kind}/{name}" in hub.repos
                hub.repos.setdefault(f"{kind}/{name}", {"main": []})
                if wanted.get("visibility") == "private" or wanted.get("private"):
                    hub.private.add(f"{kind}/{name}")
                self._answer(
                    {"url": url} | ({"error": "You already created this repo"} if exists else {}), 409 if exists else 200
                )
        elif parts[0] == "lfs":
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != parts[1]:
                    self._answer({"error": "wrong content"}, 400)
                    return
                hub.blobs[parts[1]] = body
                self._answer({})
            else:
                self._answer({}, 200 if parts[1] in hub.blobs else 404)
        elif path.endswith(".git/info/lfs/objects/batch"):
            if self._may_write():
                objects = []
                for wanted in json.loads(body)["objects"]:
                    entry = {"oid": wanted["oid"], "size": wanted["size"]}
                    if wanted["oid"] not in hub.blobs:
                        entry["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{wanted['oid']}"}}
                    objects.append(entry)
                self._answer({"transfer": "basic", "objects": objects})
        elif parts[0] == "api":
            self._route_api(f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4:], query, body)
        else:
            kind = parts[0] if parts[0] in ("datasets", "spaces") else "models"
            parts = parts[1:] if kind != "models" else parts
            self._resolve(f"{kind}/{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))

    def _find(self, repo, branch):
        if repo in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if repo not in self.hub.repos:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        for name, commits in self.hub.repos[repo].items():
            sha = _sha(repo, name, commits)
            if branch in (name, sha):
                return name, commits, sha
        self._answer({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _route_api(self, repo, rest, query, body):
        hub = self.hub
        action = rest[0] if rest else "revision"
        if action in ("branch", "preupload", "commit"):
            if not self._may_write():
                return
            if action == "branch":
                branches = hub.repos[repo]
                if rest[1] in branches:
                    self._answer({"error": "Reference already exists"}, 409)
                else:
                    branches[rest[1]] = list(branches["main"])
                    self._answer({}, 201)
                return
            found = self._find(repo, rest[1])
            if found is None:
                return
            name, commits, _ = found
            standing = commits[-1] if commits else {}
            if action == "preupload":
                files = json.loads(body)["files"]
                self._answer({"files": [
                    {"path": file["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                     "oid": _oid(file["path"], standing[file["path"]]) if file["path"] in standing else None} for file in files
                ]})  # fmt: skip
                return
            with hub.lock:
                tree = dict(standing)
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        tree[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        if value["oid"] not in hub.blobs:
                            self._answer({"error": "LFS object missing"}, 400)
                            return
                        tree[value["path"]] = hub.blobs[value["oid"]]
                    elif line["key"] == "deletedFile":
                        tree.pop(value["path"], None)
                commits.append(tree)
            sha = _sha(repo, name, commits)
            self._answer({"commitUrl": f"http://{self.headers['Host']}/{repo.partition('/')[2]}/commit/{sha}", "commitOid": sha,
                          "pullRequestUrl": None})  # fmt: skip
            return
        found = self._find(repo, rest[1] if len(rest) > 1 and action in ("revision", "tree", "paths-info") else "main")
        if found is None:
            return
        _, commits, sha = found
        files = commits[-1] if commits else {}
        if action == "revision":
            self._answer({"id": repo.partition("/")[2], "sha": sha, "private": repo in hub.private, "gated": False, "tags": [],
                          "downloads": 0, "likes": 0, "pipeline_tag": "audio-classification",
                          "siblings": [{"rfilename": file} for file in files]})  # fmt: skip
        elif action == "tree":
            self._answer([_entry(path, content) for path, content in files.items()])
        elif action == "paths-info":
            try:
                wanted = json.loads(body)["paths"]
            except json.JSONDecodeError:
                wanted = parse_qs(body.decode()).get("paths", [])
            self._answer([_entry(path, files[path]) for path in wanted if path in files])
        else:
            self._answer({"error": "not served here"}, 404)

    def _resolve(self, repo, branch, path):
        found = self._find(repo, branch)
        if found is None:
            return
        _, commits, sha = found
        content = commits[-1].get(path) if commits else None
        if content is None:
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self._answer(
            content, 200, {"X-Repo-Commit": sha, "ETag": f'"{_oid(path, content)}"', "Content-Type": "application/octet-stream"}
        )


def _sha(repo, branch, commits):
    files = commits[-1] if commits else {}
    state = f"{repo} {len(commits)} {sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())}"
    return hashlib.sha1((state + branch).encode()).hexdigest()


def _oid(path, content):
    """Returns git's name of a blob, or of a large file its sha256."""
    if path.endswith((".safetensors", ".png")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path, content):
    entry = {"type": "file", "oid": _oid(path, content), "size": len(content), "path": path}
    if path.endswith((".safetensors", ".png")):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
    return entry
