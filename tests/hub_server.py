"""A model and data hub on the loopback, for the real clients: what they ask of huggingface.co, answered from memory.

Routes and headers are those of the hub's API documentation (huggingface.co/docs/hub/api) and of the client's requests:
repositories with branches, tags and commits, large files behind a redirect, uploads by git LFS and one commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_test"
LARGE = (".safetensors", ".parquet")  # kept by git LFS


@dataclass
class Repository:
    """A repository: ``refs`` are branches and tags by name, ``commits`` the files of each commit."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit of these files, named by the refs; return its hash."""
        text = json.dumps([len(self.commits), sorted((name, _sha(data)) for name, data in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.refs |= dict.fromkeys(refs, commit)
        return commit


@dataclass
class Hub:
    """The hub. ``broken`` counts, by file, the answers still to be cut off half-way; ``asked`` is every request.

    ``failing`` refuses all but the front page.
    """

    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    failing: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)  # of git LFS, by SHA-256

    def __enter__(self) -> "Hub":
        self._serve()
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Serve nothing while the context lasts, then again at the same address."""
        self._stop()
        yield
        self._serve(self.port)

    def _serve(self, port: int = 0) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = f"http://localhost:{self.port}/store"  # another host, as the hub's large files are
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):
    """An answer that is no success: status, the hub's code, its words."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20
    wbufsize = -1  # one packet an answer: its second would wait 40 ms for the first's acknowledgement

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.hub.asked.append((self.command, unquote(self.path), self.headers.get("Range", "")))
        self.query, path = parse_qs(address.query), address.path
        self.body = self._read()
        try:
            if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            if self.hub.failing and path != "/":
                raise _Refused(410, "", "not today")
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    getattr(self, method)(**{name: unquote(part or "") for name, part in found.groupdict().items()})
                    return
            raise _Refused(404, "", "no such page")
        except _Refused as refused:
            status, code, message = refused.args
            self._send(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _read(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # ------------------------------------------------------------------------------ who may see what

    def _member(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, name: str) -> Repository:
        known = self.hub.datasets if kind == "datasets" else self.hub.models
        found = known.get(name)
        if found is None or (found.private and not self._member()):
            raise _Refused(404 if self._member() else 401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(kind, name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _refuse_gated(self, kind: str, name: str) -> None:
        if self._repository(kind, name).gated:
            code, words = (403, "are not on its list") if self._member() else (401, "must log in")
            raise _Refused(code, "GatedRepo", f"Access to {name} is restricted: you {words}")

    def auth_check(self, kind: str, name: str) -> None:
        self._refuse_gated(kind, name)
        self._json({})

    # ------------------------------------------------------------------------------ reading

    def front(self) -> None:
        self._send(200)

    def search(self, kind: str) -> None:
        known = self.hub.datasets if kind == "datasets" else self.hub.models
        words, author = self.query.get("search", [""])[0].lower(), self.query.get("author", [""])[0]
        found = [name for name in known if words in name.lower() and (not author or name.startswith(f"{author}/"))]
        self._json([{"id": name, "private": False} for name in found if not known[name].private])

    def info(self, kind: str, name: str, revision: str = "") -> None:
        commit, files = self._files(kind, name, revision or "main")
        repository = self._repository(kind, name)
        siblings = [{"rfilename": path} for path in files]
        told = {"sha": commit, "siblings": siblings, "private": repository.private, "tags": []}
        self._json({"id": name, "gated": "manual" if repository.gated else False, **told})

    def refs(self, kind: str, name: str) -> None:
        refs = self._repository(kind, name).refs.items()
        listed = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit} for ref, commit in refs]
        self._json({"branches": listed, "tags": [], "converts": []})

    def tree(self, kind: str, name: str, revision: str, folder: str = "") -> None:
        files = self._files(kind, name, revision)[1]
        below = f"{folder}/" if folder else ""
        inside = [path for path in files if path.startswith(below)]
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            listed, folders = inside, {path.rpartition("/")[0] for path in inside if "/" in path[len(below) :]}
        else:
            listed = [path for path in inside if "/" not in path[len(below) :]]
            folders = {below + path[len(below) :].partition("/")[0] for path in set(inside) - set(listed)}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        self._json(entries + [_entry(path, files[path]) for path in listed])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        files = self._files(kind, name, revision)[1]
        form = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if form else parse_qs(self.body.decode())["paths"]
        folders = {path.rpartition("/")[0] for path in files}
        found = [_entry(path, files[path]) for path in paths if path in files]
        known = [path for path in paths if path in folders and path]
        self._json(found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in known])

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        commit, files = self._files(kind, name, revision)
        self._refuse_gated(kind, name)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[path]
        if not path.endswith(LARGE):
            self._content(path, data, {"ETag": f'"{_git(data)}"', "X-Repo-Commit": commit})
            return
        self.hub.stored[_sha(data)] = data
        linked = {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
        self._send(302, b"", {"Location": f"{self.hub.store}/{_sha(data)}/{path}", **linked})

    def _content(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the part of it that is asked for; only half of that, if it is to be cut off."""
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2]) if wanted[2] else len(data) - 1
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            status, data = 206, data[first : last + 1]
        if self.command == "GET" and self.hub.broken.get(path):
            self.hub.broken[path] -= 1
            headers |= {"Content-Length": str(len(data)), "Connection": "close"}
            self._send(status, data[: len(data) // 2], headers)
            self.close_connection = True
            return
        self._send(status, data, {"Accept-Ranges": "bytes", **headers})

    # ------------------------------------------------------------------------------ writing

    def _must_be_member(self) -> None:
        if not self._member():
            raise _Refused(401, "", "Invalid username or password.")

    def whoami(self) -> None:
        self._must_be_member()
        self._json({"type": "user", "name": "me", "orgs": []})

    def create(self) -> None:
        self._must_be_member()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            raise _Refused(403, "", f"You don't have the rights to create a model under the namespace {name}")
        if name in self.hub.models:
            self._send(409, json.dumps({"error": "You already created this model repo"}).encode())
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.models[name] = Repository(private=private)
        self.hub.models[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def valid(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        self._must_be_member()
        self._files(kind, name, revision)
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": [{**file, "shouldIgnore": False} for file in files]})

    def batch(self, name: str) -> None:
        self._must_be_member()
        objects = json.loads(self.body)["objects"]
        upload = [{**one, "actions": {"upload": {"href": f"{self.hub.store}/{one['oid']}/new"}}} for one in objects]
        self._json({"transfer": "basic", "objects": upload})

    def store(self, oid: str, path: str) -> None:
        if self.command != "PUT":
            self._content(path, self.hub.stored[oid], {"ETag": f'"{oid}"'})
            return
        assert _sha(self.body) == oid
        self.hub.stored[oid] = self.body
        self._send(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        self._must_be_member()
        files = dict(self._files(kind, name, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        made = self._repository(kind, name).commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made, "success": True})


def _entry(path: str, data: bytes) -> dict[str, object]:
    """Return a file as a listing shows it."""
    large = {"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else {}
    return {"type": "file", "path": path, "size": len(data), "oid": _git(data), **large}


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (r"/?", "front"),
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "valid"),
    (r"/api/(?P<kind>models|datasets)", "search"),
    (_API, "info"),
    (_API + r"/revision/(?P<revision>[^/]+)", "info"),
    (_API + r"/auth-check", "auth_check"),
    (_API + r"/refs", "refs"),
    (_API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "tree"),
    (_API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (_API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    (_API + r"/commit/(?P<revision>[^/]+)", "commit"),
    (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (r"/store/(?P<oid>[0-9a-f]{64})/(?P<path>.*)", "store"),
    (r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)", "resolve"),
)
