"""A hub on this machine that serves real files: as much of the hub's interface as the library needs for a download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)  # what the hub stores by SHA-256, as Git LFS does


@dataclass
class Hub:
    """What is served.

    Attributes:
        models: owner/name -> revision -> folder; `main` is what is meant without a revision.
        datasets: the same of data sets, whose files may be in folders.
        troubles: answers to the next requests for a data set's file or facts, in order: a status, or "broken".
        lies: files whose bytes are served changed, at the same length.
        address: http://127.0.0.1:PORT.
        requests: method and path of each request.
    """

    models: dict[str, dict[str, Path]]
    datasets: dict[str, dict[str, Path]] = field(default_factory=dict)
    troubles: list[int | str] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)
    address: str = ""
    requests: list[str] = field(default_factory=list)


def commit_of(folder: Path) -> str:
    """A commit's name for what lies in `folder`."""
    return hashlib.sha1(str(folder).encode(), usedforsecurity=False).hexdigest()


def _entry(path: Path, data: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path.name, "size": len(data), "oid": blob}
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
            if words[:2] == ["api", "datasets"] or words[0] == "datasets":
                return self.of_dataset(words, body)
            if words[:2] == ["api", "models"]:
                return self.tell(words[2:], body)
            if len(words) == 5 and words[2] == "resolve":
                return self.file("/".join(words[:2]), words[3], words[4], body)
            return self.refuse("EntryNotFound", body)

        def of_dataset(self, words: list[str], body: bool) -> None:
            """A data set's facts (commit and files), or one of its files."""
            facts = words[0] == "api"
            repo, rest = "/".join(words[2:4] if facts else words[1:3]), words[4:]
            revisions = hub.datasets.get(repo)
            if hub.troubles:
                trouble = hub.troubles.pop(0)
                if trouble == "broken":
                    self.close_connection = True
                    return None
                return self.send(b"{}", {"Retry-After": "3"}, body, int(trouble))
            if revisions is None:
                return self.refuse("RepoNotFound", body)
            named = revisions | {commit_of(folder): folder for folder in revisions.values()}
            revision = (rest[1] if len(rest) > 1 else "main") if facts else rest[0]
            if revision not in named:
                return self.refuse("RevisionNotFound", body)
            folder = named[revision]
            if facts:
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                siblings = [{"rfilename": name} for name in files]
                told = {"id": repo, "sha": commit_of(folder), "siblings": siblings, "tags": []}
                return self.send(json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
            path = folder / "/".join(rest[1:])
            if not path.is_file():
                return self.refuse("EntryNotFound", body)
            data = path.read_bytes()
            headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{_entry(path, data)["oid"]}"'}
            return self.send(data, headers, body)

        def folder(self, repo: str, revision: str) -> Path | None:
            revisions = hub.models.get(repo, {})
            named = revisions | {commit_of(folder): folder for folder in revisions.values()}
            return named.get(revision)

        def tell(self, words: list[str], body: bool) -> None:
            """Of a model: its commit and files, or the files with their sizes and hashes."""
            repo, revision = "/".join(words[:2]), words[3] if len(words) > 3 else "main"
            folder = self.folder(repo, revision)
            if folder is None:
                return self.refuse("RevisionNotFound" if repo in hub.models else "RepoNotFound", body)
            files = sorted(path for path in folder.iterdir() if path.is_file())
            entries = [_entry(path, path.read_bytes()) for path in files]
            if words[2:3] == ["tree"]:
                return self.send(json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
            siblings = [{"rfilename": path.name} for path in files]
            facts = {"id": repo, "modelId": repo, "sha": commit_of(folder), "siblings": siblings, "tags": []}
            return self.send(json.dumps(facts).encode(), {"Content-Type": "application/json"}, body)

        def file(self, repo: str, revision: str, name: str, body: bool) -> None:
            folder = self.folder(repo, revision)
            if folder is None or not (folder / name).is_file():
                return self.refuse("EntryNotFound", body)
            data = (folder / name).read_bytes()
            entry = _entry(folder / name, data)
            headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "none"}
            if "lfs" in entry:
                headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
            if name in hub.lies:
                data = data[:-1] + bytes([data[-1] ^ 1])
            return self.send(data, headers, body)

        def refuse(self, code: str, body: bool) -> None:
            self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body, 404)

        def send(self, data: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing is told."""

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.address` for as long as this is entered."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
