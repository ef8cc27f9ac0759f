"""Hub ids: its cache serves without a network; what it lacks is one clear line within seconds, and says why."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest
import torch
from codebook_folder import write_codebook
from conftest import tiny_llava
from huggingface_hub import constants

from codebook_prune import Codebook, UserError, load_model

NOWHERE = "http://127.0.0.1:9"


class Empty(BaseHTTPRequestHandler):
    """A Hub that has nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def empty_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_hub() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


LISTINGS: dict[str, list[object]] = {
    "plain": [],
    "up": ["../../../../up.safetensors"],
    "absolute": ["/tmp/canary/absolute.safetensors"],
    "through": ["index/../../../../../through.faiss"],
    "backslash": ["..\\..\\backslash.safetensors"],
    "inside": ["manifest.json/x.parquet"],
    "nul": ["a\0.parquet"],
    "long": ["x" * 300 + ".safetensors"],
    "odd": [7, None],
}
CANARY = b"a canary of no use"


class Stranger(BaseHTTPRequestHandler):
    """A Hub whose `someone/<name>` lists the files of a sound codebook and the names of LISTINGS; those hold canaries."""

    files: ClassVar[dict[object, bytes]]

    def do_GET(self) -> None:
        path = unquote(self.path)
        book = path.partition("/someone/")[2].partition("/")[0]
        names = [*self.files, *LISTINGS.get(book, [])]
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(self.files.get(n, CANARY)), "oid": "b" * 40} for n in names]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/"):
            body = json.dumps(
                {"id": f"someone/{book}", "sha": "a" * 40, "siblings": [{"rfilename": n} for n in names]}
            ).encode()
        else:
            body = self.files.get(path.rpartition("/")[2], CANARY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


LOADING = """
import json, sys
from codebook_prune import Codebook, UserError
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = len(Codebook.from_pretrained(f"someone/{name}"))
    except UserError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_no_name_that_a_hub_lists_leads_out_of_its_cache(tmp_path: Path) -> None:
    book = write_codebook(tmp_path / "book", tiny_llava(), torch.randn(5, 64))
    Stranger.files = {p.name: p.read_bytes() for p in book.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = os.environ | {
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", LOADING, *LISTINGS]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plain"] == 5
    for name in ("up", "absolute", "through", "backslash", "odd"):
        assert found[name].startswith(f"cannot fetch codebook someone/{name} from the Hub: "), found[name]
    for name, value in found.items():
        assert value == 5 or (value.isprintable() and len(value) < 500), name
    assert {p.name for p in tmp_path.iterdir()} == {"book", "home"}
    canaries = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == CANARY]
    assert canaries
    assert all(p.is_relative_to(tmp_path / "home/hub") and p.resolve().parent.name == "blobs" for p in canaries)
    assert not Path("/tmp/canary").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An empty cache and no Hub at all; a test may name another one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    return monkeypatch


def refusal(load: object, seconds: float) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load("someone/none")  # type: ignore[operator]
    assert time.monotonic() - began < seconds
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_snapshot_is_found_by_its_hub_id(tmp_path: Path, hub: pytest.MonkeyPatch, offline: bool) -> None:
    hub.setattr(constants, "HF_HUB_OFFLINE", offline)
    cache = tmp_path / "hub" / "models--someone--book"
    write_codebook(cache / "snapshots" / "0123abc", tiny_llava(), torch.randn(5, 64))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert len(Codebook.from_pretrained("someone/book")) == 5


@pytest.mark.parametrize(("load", "kind"), [(Codebook.from_pretrained, "codebook"), (load_model, "model")])
def test_a_hub_that_cannot_be_reached_is_told_from_one_that_has_nothing(
    hub: pytest.MonkeyPatch, empty_hub: str, silent_hub: str, load: object, kind: str
) -> None:
    missing = f"and its cache holds no {kind} of that name: check the name or the network"
    for endpoint in (NOWHERE, silent_hub):
        hub.setattr(constants, "ENDPOINT", endpoint)
        text = refusal(load, 5)
        assert text.startswith("there is no folder someone/none, the Hub cannot be reached (")
        assert text.endswith(missing)
    hub.setattr(constants, "ENDPOINT", empty_hub)
    assert f"there is no folder someone/none, and the Hub has no {kind} of that name" in refusal(load, 5)
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in refusal(load, 5)


def test_the_command_gives_up_within_seconds(tmp_path: Path) -> None:
    variables = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOWHERE}
    command = [sys.executable, "-c", "from codebook_prune import load_model; load_model('some-org/unknown')"]
    began = time.monotonic()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert "there is no folder some-org/unknown, the Hub cannot be reached" in done.stderr
    assert "Retrying" not in done.stderr
    assert time.monotonic() - began < 20  # most of it imports


class Receiver(BaseHTTPRequestHandler):
    """A Hub that takes commits, and remembers them and what it was sent with."""

    files: ClassVar[dict[str, bytes]]
    tokens: ClassVar[set[str | None]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        answer: dict[str, object] = {"url": "x/someone/book"}
        if "/preupload/" in self.path:
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for f in json.loads(body)["files"]]}  # fmt: skip
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files.update(
                {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            )
            answer = {"commitUrl": "x/someone/book/commit/1", "commitOid": "1" * 40, "success": True}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


PUSHING = """
import os, sys
from codebook_prune import Codebook
print(Codebook.from_pretrained(sys.argv[1]).push_to_hub("someone/book"))
"""


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which pushes go to a `Receiver`, with a token that is a secret."""
    Receiver.files, Receiver.tokens = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_" + "s" * 34,
    }  # fmt: skip
    server.shutdown()
    server.server_close()


def test_only_what_the_manifest_lists_is_pushed(tmp_path: Path, receiver: dict[str, str]) -> None:
    """A killed extension has left a part and an index behind; there are notes and a token, too."""
    book = write_codebook(tmp_path / "book", tiny_llava(), torch.randn(5, 64))
    listed = {p.relative_to(book).as_posix(): p.read_bytes() for p in book.rglob("*") if p.is_file()}
    (book / "index").mkdir(exist_ok=True)
    for name in ("prototypes-00001.safetensors", "prototypes-00001.parquet", "index/shard-00009.faiss", ".x.tmp", ".env"):
        (book / name).write_bytes(b"left behind")
    done = subprocess.run(
        [sys.executable, "-c", PUSHING, str(book)], env=receiver, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "x/someone/book/commit/1"
    assert Receiver.files == listed
    assert "manifest.json" in listed
    token = receiver["HF_TOKEN"]
    assert Receiver.tokens == {f"Bearer {token}"}
    assert all(token.encode() not in data for data in Receiver.files.values())
    assert token not in done.stdout + done.stderr


def test_a_codebook_that_changed_since_it_was_loaded_is_not_pushed(tmp_path: Path) -> None:
    book = Codebook.from_pretrained(write_codebook(tmp_path / "book", tiny_llava(), torch.randn(5, 64)))
    book.manifest.model_copy(update={"version": 2}).commit(tmp_path / "book")
    with pytest.raises(UserError, match="has changed since it was loaded: load it again"):
        book.push_to_hub("someone/book")
