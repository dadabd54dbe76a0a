"A Hub of a few models in this process: the part of its REST interface that a download uses, with faults on demand."
import hashlib, json, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    "`models` is {name: {revision: {path: bytes}}}; a revision is also found by its commit, a hash of its content."
    def __init__(self, models: dict):
        self.models, self.requests, self.status = models, [], None
        self.broken = {} # file -> the byte at which every connection breaks off

    def commit(self, name: str, revision: str) -> str:
        files = self.models[name][revision]
        return hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()

    def find(self, name: str, revision: str):
        "(commit, files) or None"
        for branch, files in self.models[name].items():
            commit = self.commit(name, branch)
            if revision in (branch, commit): return commit, files
        return None


def handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_): pass

        def answer(self, status: int, body: bytes = b"", headers: dict | None = None, cut: int | None = None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items(): self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD": self.wfile.write(body[:cut])
            if cut is not None and self.command != "HEAD":
                self.wfile.flush()
                self.close_connection = True

        def no(self, code: str): self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} /{path}")
            if hub.status: return self.answer(hub.status, b"{}", {"X-Error-Code": "GatedRepo"} if hub.status == 403 else {})
            words = path.split("/")
            api = words[:2] == ["api", "models"]
            name = "/".join(words[2:4] if api else words[:2])
            if name not in hub.models: return self.no("RepoNotFound")
            rest = words[4:] if api else words[2:]
            revision = rest[1] if len(rest) > 1 else "main"
            found = hub.find(name, revision)
            if found is None: return self.no("RevisionNotFound")
            commit, files = found
            if api and rest[:1] == ["tree"]: return self.answer(200, json.dumps([self.entry(n, files[n]) for n in sorted(files)]).encode())
            if api: return self.answer(200, json.dumps({"id": name, "sha": commit, "private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": n} for n in sorted(files)]}).encode())
            file = "/".join(rest[2:])
            if rest[0] != "resolve" or file not in files: return self.no("EntryNotFound")
            data = files[file]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"ETag": f'"{self.entry(file, data)["oid"]}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
            if start: headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = max(0, hub.broken[file] - start) if file in hub.broken else None
            self.answer(206 if start else 200, data[start:], headers, cut)

        do_HEAD = do_GET

        @staticmethod
        def entry(name: str, data: bytes) -> dict:
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    return Handler


@contextmanager
def running_hub(models: dict):
    "(address, Hub) of a server that ends with the block."
    hub = Hub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
