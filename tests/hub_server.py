"""A Hub in memory, on this machine's loopback: the few endpoints that uploading and downloading repositories need.

Point `HF_ENDPOINT` at its `url` and set `HF_HUB_DISABLE_XET` before huggingface_hub is imported. Large files then go
by Git LFS.
"""

import base64
import hashlib
import json
import posixpath
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = (".safetensors", ".mp4", ".parquet")


class HubHandler(BaseHTTPRequestHandler):
    """Serves `server.repos`: `models/owner/name` or `datasets/owner/name` -> path -> content."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repos.setdefault(f"{wanted.get('type', 'model')}s/{name}", {})
            self.send_json({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            uploads = {"upload": {"href": f"{self.server.url}/lfs"}}
            self.send_json({"objects": [entry | {"actions": uploads} for entry in json.loads(body)["objects"]]})
        elif re.fullmatch(r"/api/.+/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self.send_json(
                {
                    "files": [
                        {"path": name, "uploadMode": modes[name.endswith(LARGE)], "shouldIgnore": False}
                        for name in names
                    ]
                }
            )
        elif found := re.fullmatch(r"/api/(.+)/commit/[^/]+", path):
            self.commit(self.server.repos[found[1]], [json.loads(line) for line in body.splitlines()])
            self.send_json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        elif found := re.fullmatch(r"/api/(.+)/paths-info/[^/]+", path):
            wanted = parse_qs(body.decode())["paths"]
            self.send_json([entry for entry in entries(self.server.repos[found[1]]) if entry["path"] in wanted])
        else:
            self.send_failure("EntryNotFound")

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.send_json({})

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/[^/]+)?", path):
            if (files := self.server.repos.get(found[1])) is None:
                self.send_failure("RepoNotFound")
            else:
                siblings = [{"rfilename": name} for name in files]
                self.send_json({"id": found[1].partition("/")[2], "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            recursive = "recursive=true" in self.path.lower()
            listed = [
                entry
                for entry in entries(self.server.repos.get(found[1], {}))
                if within(entry["path"], found[2], recursive)
            ]
            self.send_json(listed) if listed else self.send_failure("EntryNotFound")
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo = self.server.repos.get((found[1] or "models/") + found[2])
            if repo is None or found[3] not in repo:
                self.send_failure("RepoNotFound" if repo is None else "EntryNotFound")
            else:
                self.send_content(repo[found[3]])
        else:
            self.send_failure("EntryNotFound")

    do_HEAD = do_GET

    def commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        self.server.commits.append(lines[0]["value"]["summary"])
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            files[value["path"]] = self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"])

    def send_content(self, content: bytes) -> None:
        status, first, size = 200, 0, len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, first = 206, int(wanted[1])
            content = content[first : int(wanted[2]) + 1 if wanted[2] else None]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content) -> None:
        self.send_content(json.dumps(content).encode())

    def send_failure(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def entries(files: dict[str, bytes]) -> list[dict]:
    """Files and folders of a repository as the Hub lists them."""
    folders = {parent for name in files for parent in parents(name)}
    listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
    return listed + [
        {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        for name, content in sorted(files.items())
    ]


def parents(path: str) -> list[str]:
    parent = posixpath.dirname(path)
    return [parent, *parents(parent)] if parent else []


def within(path: str, folder: str, recursive: bool) -> bool:
    return folder in (parents(path) or [""]) + [""] if recursive else posixpath.dirname(path) == folder


@contextmanager
def running_hub() -> Iterator[ThreadingHTTPServer]:
    """A Hub with `url`, `repos`, and `commits`, the messages of all commits in order."""
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.repos, server.large, server.commits = {}, {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
