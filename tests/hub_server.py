"""A Hub on loopback that accepts uploads and remembers them: create a repository, preupload, commit."""

import base64
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """What arrived: requests as (method, path, authorization), and committed files by path."""

    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    message: str = ""


@contextmanager
def hub_server():
    """Serves on a free port until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond()

        def do_POST(self) -> None:
            self.respond()

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
            answer = reply(hub, self.command, path, body)
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer or {"error": "not found"}).encode())

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def reply(hub: Hub, method: str, path: str, body: bytes) -> dict | None:
    if path == "/api/repos/create":
        name = json.loads(body)["name"]
        return {"url": f"{hub.url}/somebody/{name}", "id": f"somebody/{name}", "name": f"somebody/{name}"}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
        return {
            "files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
        }
    if re.fullmatch(r"/api/models/[^/]+/[^/]+/commit/main", path):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.message = line["value"]["summary"]
            elif line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{hub.url}/somebody/lora/commit/abc", "commitOid": "abc", "success": True}
    if method == "GET" and re.fullmatch(r"/api/models/[^/]+/[^/]+(/revision/main)?", path):
        return {"id": "somebody/lora", "sha": "0" * 40, "siblings": [], "private": False, "tags": []}
    return None
