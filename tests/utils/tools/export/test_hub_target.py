"""Exports to the Hugging Face Hub: the real client against a server on 127.0.0.1."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from utils.base.errors import AccessDeniedError, StorageError, UsageError
from utils.tools.export.hub_target import HubTarget

TOKEN = "hf_" + "x" * 34


class FakeHub(ThreadingHTTPServer):
    """As much of the Hub as a commit of small files needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.refuses_writes = False


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami-v2"):
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid credentials"})
            return self._answer(200, {"name": "me", "type": "user"})
        name = self.path.split("?")[0].removeprefix("/api/models/")
        files = self.server.repositories.get(name)
        if files is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            return self._answer(404, {"error": "Repository not found"}, headers)
        return self._answer(
            200, {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": one} for one in files]}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("visibility") == "private" or asked.get("private") is True
            self.server.private.setdefault(name, is_private)
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            return self._answer(200, {"url": f"{self.server.url}/{name}", "id": "1"})
        if self.server.refuses_writes:
            return self._answer(403, {"error": "Forbidden: the token may only read"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        owner, repository, what = self.path.removeprefix("/api/models/").split("/")[:3]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
            ]
            return self._answer(200, {"files": modes})
        self._commit(self.server.repositories[f"{owner}/{repository}"], body)
        return self._answer(
            200,
            {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.server.url}/{owner}/{repository}/commit/{'1' * 40}",
                "hookOutput": "",
            },
        )

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        self.server.commits += 1
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]

    def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()
        thread.join()


def make_target(tmp_path: Path, **changes: Any) -> HubTarget:
    options = {"is_whole": True, "overwrite": False, "is_private": False, **changes}
    return HubTarget("hub:me/small", tmp_path / "scratch", **options)


def publish(target: HubTarget, **files: str) -> None:
    target.require_free()
    with target.staging() as staged:
        for name, text in files.items():
            (staged / name.replace("_", ".")).write_text(text)
        target.publish(staged, lambda stage, done, total: None)
    assert not list(target.scratch.iterdir())


def test_a_model_is_one_commit(hub: FakeHub, tmp_path: Path) -> None:
    publish(make_target(tmp_path, is_private=True), config_json="{}", README_md="text")
    files = hub.repositories["me/small"]
    assert files == {".gitattributes": b"", "config.json": b"{}", "README.md": b"text"}
    assert (hub.commits, hub.private) == (1, {"me/small": True})


def test_another_model_replaces_it_only_when_asked(hub: FakeHub, tmp_path: Path) -> None:
    publish(make_target(tmp_path), config_json="{}", model_safetensors="1")
    hub.repositories["me/small"]["notes.txt"] = b"kept"
    with pytest.raises(UsageError, match=r"hub:me/small holds .* \(3 files\).*--overwrite"):
        make_target(tmp_path).require_free()
    publish(make_target(tmp_path, overwrite=True), config_json="{1}", README_md="new")
    assert hub.repositories["me/small"] == {
        ".gitattributes": b"",
        "config.json": b"{1}",
        "README.md": b"new",
        "notes.txt": b"kept",
    }
    # A single file is added to what is there.
    publish(make_target(tmp_path, overwrite=True, is_whole=False), small_gguf="GGUF")
    assert len(hub.repositories["me/small"]) == 5


def test_what_came_there_while_the_model_was_written_is_not_replaced(
    hub: FakeHub, tmp_path: Path
) -> None:
    target = make_target(tmp_path)
    target.require_free()
    with target.staging() as staged:
        (staged / "config.json").write_text("{}")
        hub.repositories["me/small"] = {"config.json": b"theirs"}
        with pytest.raises(UsageError, match=r"hub:me/small holds config\.json already"):
            target.publish(staged, lambda stage, done, total: None)
    assert (hub.repositories["me/small"], hub.commits) == ({"config.json": b"theirs"}, 0)


def test_no_token_no_right_and_no_network_are_one_message(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match="the token is not valid"):
        target.require_free()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses_writes = True
    with pytest.raises(AccessDeniedError, match="may not write there"):
        publish(target, config_json="{}")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a token: set HF_TOKEN"):
        target.require_free()
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="hub:me/small: .*Run the same command again"):
        target.require_free()


@pytest.mark.parametrize("name", ["hub:", "hub:me", "hub:me/small/x", "hub:../x", "hub:me/sm all"])
def test_a_name_that_is_no_repository_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give hub:OWNER/NAME"):
        HubTarget(name, tmp_path, is_whole=True, overwrite=False, is_private=False)
