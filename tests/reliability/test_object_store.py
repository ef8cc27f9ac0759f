"""Builds in an object store: a real S3-compatible server (moto, a process on loopback), the same digests as on a disk."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import torch
from building import scene_shards, score_table, small_config, write_config
from codebook_folder import write_codebook
from conftest import tiny_llava
from test_build import command, kill_driver
from test_commit import SHARD, marker_of, write_part

from codebook_builder import cli
from codebook_builder.artefact import digest, verify
from codebook_builder.build import Build, Report
from codebook_builder.commit import collect_garbage, commit, committed, read_part, verify_part
from codebook_builder.publish import reselect
from codebook_builder.run import Probed, RunFolder
from codebook_builder.upload import check_unclaimed, upload
from codebook_builder.worker import run_locally
from codebook_prune import Codebook
from codebook_prune import stored as stored_module
from codebook_schemas import BuildConfig, UserError
from codebook_schemas.inputs import InputManifest
from codebook_schemas.object_store import ObjectPath, place

ROOT = Path(__file__).parents[2]
SHARDS, IMAGES, TOKENS = 2, 3, 6
SMALL: dict[str, Any] = {
    "probe": {"tokens_per_image": TOKENS},
    "thresholds": {"calibration_images": 2, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}},
    "selection": {"min_images": 0, "inter_clusters": 2, "intra_clusters": 2},
    "cluster": {"cpus_per_worker": 0.5},
}
SECRET, KEY = secrets.token_hex(20), "AKIA" + secrets.token_hex(8).upper()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectPath]:
    """A bucket with three shards of scenes under s3://books/shards, and an environment in which it is found."""
    server = subprocess.Popen([sys.executable, ROOT / "tests/s3_server.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("books")
        files.mkdir("deaf")
        folder = tmp_path_factory.mktemp("shards")
        scene_shards(folder, SHARDS, IMAGES)
        files.put(f"{folder}/", "books/shards/", recursive=True)
        yield ObjectPath("s3://books")
    server.terminate()
    server.wait()
    server.stdout.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The same build on a disk."""
    folder = tmp_path_factory.mktemp("local")
    return build(small_config(scene_shards(folder, SHARDS, IMAGES), folder / "book", **SMALL))


def build(config: BuildConfig) -> Report:
    return Build(config, partial(run_locally, attempts=2), quiet=True).codebook()


@pytest.fixture(scope="module")
def stored(store: ObjectPath) -> BuildConfig:
    """A build of the same shards that has ended in the store."""
    config = config_in(store, "whole")
    build(config)
    return config


def config_in(store: ObjectPath, name: str, **changes: Any) -> BuildConfig:
    return small_config(f"{store}/shards/s-{{000..{SHARDS - 1:03d}}}.tar", f"{store}/{name}/book", **(SMALL | changes))


def check_rows(config: BuildConfig) -> None:
    """Every row was committed once, and no other part is left."""
    run = RunFolder.of(config.output)
    inputs = run.inputs(config.shards)
    run.collect_garbage(-5)
    hashes = {json.loads(path.read_bytes())["probe_hash"] for path in (run.parts / "_done").glob("*")}
    probed = Probed.load(run.parts, inputs, hashes.pop())
    rows = pa.concat_tables(t.select(["shard", "key", "token"]) for t in probed.tables())
    assert rows.num_rows == rows.group_by(["shard", "key", "token"]).aggregate([]).num_rows == SHARDS * IMAGES * TOKENS
    assert len(list(run.parts.glob("part-*"))) == SHARDS
    assert not hashes


def test_a_stored_build_is_the_build_on_a_disk(stored: BuildConfig, whole: Report, tmp_path: Path) -> None:
    check_rows(stored)
    report = build(stored)
    assert (report.digest, report.output) == (whole.digest, stored.output)
    reselect(stored, tmp_path / "book")
    assert digest(tmp_path / "book") == whole.digest
    with pytest.raises(UserError, match=r"already holds a codebook of another build"):
        build(stored.model_copy(update={"seed": 1}))


def test_a_codebook_is_extended_from_a_store(store: ObjectPath, stored: BuildConfig, whole: Report, tmp_path: Path) -> None:
    scene_shards(tmp_path / "shards", 1, IMAGES, first=50)
    with open(tmp_path / "shards/s-000.tar", "rb") as handle:
        (store / "more.tar").upload(handle, "wb")
    reselect(stored, tmp_path / "book")
    config = small_config(f"{store}/more.tar", f"{store}/extension/book", **SMALL)
    report = Build(config, partial(run_locally, attempts=2), quiet=True).extend(tmp_path / "book")
    assert verify(tmp_path / "book").rows == report.prototypes > whole.prototypes


def test_a_stored_codebook_is_loaded_from_a_copy(
    stored: BuildConfig, whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        book = Codebook.from_pretrained(stored.output)
        assert len(book) == whole.prototypes
        assert book.folder is not None
        assert digest(book.folder) == whole.digest
    assert len(list((tmp_path / "codebook-prune").iterdir())) == 1
    with pytest.raises(UserError, match=r"cannot fetch codebook s3://books/none: "):
        Codebook.from_pretrained("s3://books/none")


def stored_book(store: ObjectPath, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    """A small codebook in the store, and a cache of its own to load it into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    target = store / f"cached-{secrets.token_hex(4)}" / "book"
    upload(write_codebook(folder / "book", tiny_llava(), torch.randn(5, 64)), target, target.parent / "claim")
    return target


def test_a_bad_transfer_is_not_kept(store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = stored_book(store, tmp_path, monkeypatch)
    fetch = stored_module.fetch

    def flipping(source: ObjectPath, folder: Path) -> None:
        fetch(source, folder)
        part = folder / "prototypes-00000.safetensors"
        data = part.read_bytes()
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(stored_module, "fetch", flipping)
        with pytest.raises(UserError, match=f"codebook {book} is damaged: the SHA-256 of prototypes-00000.safetensors"):
            Codebook.from_pretrained(str(book))
    assert list((tmp_path / "cache/codebook-prune").iterdir()) == []
    assert len(Codebook.from_pretrained(str(book))) == 5


def test_first_loads_at_once_all_end_well(store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loader has its copy before any of them moves it to its place."""
    book, fetch, barrier = stored_book(store, tmp_path, monkeypatch), stored_module.fetch, Barrier(4)

    def together(source: ObjectPath, folder: Path) -> None:
        fetch(source, folder)
        barrier.wait(60)

    monkeypatch.setattr(stored_module, "fetch", together)
    with ThreadPoolExecutor(4) as pool:
        books = list(pool.map(lambda _: Codebook.from_pretrained(str(book)), range(4)))
    assert [len(b) for b in books] == [5] * 4
    assert [p.name for p in (tmp_path / "cache/codebook-prune").iterdir()] == [books[0].folder.name]  # type: ignore[union-attr]


def test_a_codebook_replaced_while_it_is_copied_is_not_kept(
    store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, fetch = stored_book(store, tmp_path, monkeypatch), stored_module.fetch
    (other := tmp_path / "other").mkdir()
    second = write_codebook(other / "book", tiny_llava(), torch.randn(6, 64))

    def replaced(source: ObjectPath, folder: Path) -> None:
        for path in second.iterdir():
            (source / path.name).write(path.read_bytes())
        fetch(source, folder)

    monkeypatch.setattr(stored_module, "fetch", replaced)
    with pytest.raises(UserError, match="was replaced while it was copied: load it again"):
        Codebook.from_pretrained(str(book))
    assert len(Codebook.from_pretrained(str(book))) == 6


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["codebook-build", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_commands_on_stored_folders(
    stored: BuildConfig, whole: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = f"{stored.output}.json"
    for arguments, key, value in (
        (["inspect", stored.output], "digest", whole.digest),
        (["verify", stored.output], "prototypes", whole.prototypes),
        (["gc", f"{stored.output}.run"], "deleted", 0),
        (["scan", *stored.shards, "--out", listed], "samples", SHARDS * IMAGES),
    ):
        assert run_cli(monkeypatch, *arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)[key] == value
    assert InputManifest.read(place(listed)) == RunFolder.of(stored.output).inputs((listed,))


@pytest.mark.parametrize("address", [
    f"s3://{KEY}:{SECRET}@books/x", f"s3://{KEY}:a/{SECRET}@books/x", f"https://h/books/x?X-Amz-Signature={SECRET}",
    f"s3://books/x?secret={SECRET}", f"s3://books/x#{SECRET}",
    f"s3://{KEY}:{SECRET}", f"s3://{KEY}:{SECRET}\n@books/x", "gs://books/x", "s3://books", "s3://books/a/../x", "s3:///x",
], ids=range(11))  # fmt: skip
def test_addresses_are_plain(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with one is said in a line that does not repeat what may be a secret, and written nowhere."""
    monkeypatch.chdir(tmp_path)
    config = small_config(address, tmp_path / "book")
    moved = small_config("a.tar", tmp_path / "book").model_copy(update={"output": address})
    files = [str(write_config(c, tmp_path / name)) for c, name in ((config, "c.json"), (moved, "d.json"))]
    before = sorted(tmp_path.rglob("*"))
    commands = [["run", file, "--local"] for file in files]
    commands += [
        ["scan", address, "--out", "i.json"],
        ["scan", "a.tar", "--out", address],
        ["verify", address],
        ["gc", address],
    ]
    for arguments in commands:
        assert run_cli(monkeypatch, *arguments) == 2
        said = capsys.readouterr()
        assert "form s3://bucket/name" in said.err
        assert said.err.count("\n") == 1
        assert not holds_secret((said.out + said.err).encode())
    assert sorted(tmp_path.rglob("*")) == before


def test_what_takes_no_address_makes_no_folder_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["select", "c.yaml", "--output", "s3://b/x"], ["import", "p.pt", "--output", "s3://b/x"], ["merge", "a", "s3://b/x"],
        ["merge", "a", "b", "--output", "s3://b/x"], ["extend", "s3://b/x", "--config", "c.yaml"],
    ):  # fmt: skip
        assert run_cli(monkeypatch, *arguments) == 2
        assert "takes a folder of this machine, not an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


CLIENT = "import sys; {}; from codebook_builder import cli; sys.argv[1:] = {}; cli.main()"


@pytest.mark.parametrize(("before", "said"), [
    ("sys.modules['s3fs'] = None", "error: s3://books/x needs the extra s3: pip install 'codebook-prune[s3]'"),
    ("import os; [os.environ.pop(n, 0) for n in list(os.environ) if n[:4] == 'AWS_']; os.environ['HOME'] = '/nowhere'; "
     "os.environ['AWS_EC2_METADATA_DISABLED'] = 'true'", "error: s3://books/x/manifest.json: Unable to locate credentials"),
])  # fmt: skip
def test_a_store_that_cannot_be_used_is_one_line(before: str, said: str) -> None:
    command = [sys.executable, "-c", CLIENT.format(before, ["inspect", "s3://books/x"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, said)


def test_clients_are_imported_for_addresses_only(tmp_path: Path) -> None:
    book = write_codebook(tmp_path / "book", tiny_llava(), torch.randn(5, 64))
    code = CLIENT.format("import atexit; atexit.register(lambda: print('s3fs' in sys.modules, 'botocore' in sys.modules))",
                         ["verify", str(book)])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_damaged_stored_codebook_is_named(store: ObjectPath, tmp_path: Path) -> None:
    book = write_codebook(tmp_path / "book", tiny_llava(), torch.randn(5, 64))
    upload(book, store / "damaged" / "book", store / "damaged" / "claim")
    part = store / "damaged" / "book" / "prototypes-00000.safetensors"
    whole = part.read_bytes()
    part.write(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"codebook s3://books/damaged/book is damaged"):
        verify(store / "damaged" / "book")
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"s3://books/damaged/book/prototypes-00000"):
        verify(store / "damaged" / "book")


def test_of_many_writers_one_wins_and_the_others_leave_nothing(store: ObjectPath) -> None:
    folder = store / "writers"
    paths = [write_part(folder, score_table(seed=i), i) for i in range(8)]
    markers = [marker_of(path, 48) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda m: commit(folder, SHARD.name, m), markers))
    assert sum(won) == 1
    marker = committed(folder, [SHARD], "p")[SHARD.name]
    assert [p.name for p in folder.glob("part-*")] == [marker.file]
    verify_part(folder, marker)
    number = won.index(True)
    assert pa.concat_tables(read_part(folder, marker)).equals(score_table(seed=number))
    lost = write_part(folder, score_table(seed=9), 9)
    assert collect_garbage(folder, 3600) == []
    assert collect_garbage(folder, -5) == [lost]
    assert (folder / marker.file).exists()


def test_a_put_whose_answer_is_lost_has_won(store: ObjectPath) -> None:
    """The client repeats it, and the store refuses the repetition."""
    assert (store / "lost").create(b"mine")
    assert not (store / "lost").create(b"other")
    assert (store / "busy").create(b"mine")
    assert (store / "busy").read_bytes() == b"mine"


def test_a_store_that_ignores_conditions_is_refused(store: ObjectPath) -> None:
    config = small_config(f"{store}/shards/s-000.tar", "s3://deaf/book")
    with pytest.raises(UserError, match=r"s3://deaf/book.run/exclusive ignores If-None-Match"):
        build(config)
    assert not list(RunFolder.of(config.output).parts.glob("*"))


def test_codebooks_are_never_mixed(store: ObjectPath, tmp_path: Path) -> None:
    books = [write_codebook(tmp_path / str(i), tiny_llava(seed=i), torch.randn(5, 64)) for i in range(2)]
    output, claim = store / "mixed" / "book", store / "mixed" / "claim"
    check_unclaimed(output, claim)
    part = books[0] / "prototypes-00000.safetensors"
    part.rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError):  # stands for a driver that is killed: its claim is there, its codebook is not
        upload(books[0], output, claim)
    (tmp_path / "aside").rename(part)
    check_unclaimed(output, claim)
    with pytest.raises(UserError, match=r"was begun by a build that selected another codebook"):
        upload(books[1], output, claim)
    for _ in range(2):
        upload(books[0], output, claim)
    assert digest(output) == digest(books[0])
    claim.unlink()
    with pytest.raises(UserError, match=r"already holds something"):
        check_unclaimed(output, claim)
    with pytest.raises(UserError, match=r"already holds another codebook"):
        upload(books[1], output, claim)
    verify(output)
    assert digest(output) == digest(books[0])


OTHERWISE = {"min_images": 0, "inter_clusters": 1, "intra_clusters": 2}


def test_drivers_that_race_end_in_one_codebook(store: ObjectPath, tmp_path: Path) -> None:
    """They probe the same shards and select otherwise from the scores."""
    configs = [config_in(store, "race"), config_in(store, "race", selection=OTHERWISE)]
    drivers = [
        subprocess.Popen(
            command(write_config(config, tmp_path / f"{i}.json"), "--local"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for i, config in enumerate(configs)
    ]  # fmt: skip
    said = [driver.communicate(timeout=240) for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert sorted(codes) == [0, 2], said
    winner, loser = said[codes.index(0)], said[codes.index(2)]
    assert json.loads(winner[0])["digest"] == digest(place(configs[0].output))
    verify(place(configs[0].output))
    last = loser[1].strip().splitlines()[-1]
    assert last.startswith("error: s3://books/race/book ")
    assert "choose another output" in last
    check_rows(configs[0])


def test_selections_that_race_end_in_one_codebook(store: ObjectPath, stored: BuildConfig) -> None:
    """Four drivers that find all scores there: two of one selection, two of another."""
    fsspec.filesystem("s3", use_listings_cache=False).copy("books/whole/book.run", "books/scored/book.run", recursive=True)
    (store / "scored" / "book.run" / "claim").unlink()
    configs = [config_in(store, "scored"), config_in(store, "scored", selection=OTHERWISE)] * 2

    def outcome(config: BuildConfig) -> str:
        try:
            return build(config).digest
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(configs)) as pool:
        outcomes = list(pool.map(outcome, configs))
    one, other = set(outcomes[::2]), set(outcomes[1::2])
    won, lost = (one, other) if digest(store / "scored" / "book") in one else (other, one)
    assert won == {digest(store / "scored" / "book")}
    assert all("another" in text for text in lost)
    verify(store / "scored" / "book")


@pytest.mark.cluster
def test_a_killed_driver_is_resumed_and_credentials_stay_out(store: ObjectPath, whole: Report, tmp_path: Path) -> None:
    config = config_in(store, "killed", cluster={"workers": 1, "cpus_per_worker": 0.5})
    file = write_config(config, tmp_path / "c.json")
    with TemporaryDirectory(prefix="k") as short:  # holds Ray's logs, which a killed driver leaves behind
        kill_driver(file, RunFolder.of(config.output), os.environ | {"HOME": str(tmp_path), "TMPDIR": short})
        logs = [p for p in Path(short).rglob("*") if p.is_file()]
        assert any(p.name.startswith("worker-") for p in logs)
        assert [p for p in logs if holds_secret(p.read_bytes())] == []
    assert not (place(config.output) / "manifest.json").exists()
    assert build(config).digest == whole.digest
    check_rows(config)
    written = fsspec.filesystem("s3", use_listings_cache=False).find("books/killed")
    assert len(written) > 10
    assert [name for name in written if holds_secret(ObjectPath(f"s3://{name}").read_bytes())] == []


def holds_secret(data: bytes) -> bool:
    return SECRET.encode() in data or KEY.encode() in data
