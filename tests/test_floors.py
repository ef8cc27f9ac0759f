"""The architecture's rules, read off the source with ast: imports point down, heavy libraries stay in their file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "codebook_schemas": ROOT / "schemas/codebook_schemas",
    "codebook_prune": ROOT / "runtime/codebook_prune",
    "codebook_builder": ROOT / "codebook_builder",
    "jobs": ROOT / "jobs",
}
FLOOR = {"codebook_schemas": 0, "codebook_prune": 1, "codebook_builder": 2, "jobs": 3}
ONLY_IN = {
    "ray": {"codebook_builder/cluster.py", "codebook_builder/dispatch.py", "jobs/build_codebook.py"},
    "typer": {"runtime/codebook_prune/cli.py", "codebook_builder/cli.py"},
    "faiss": {"runtime/codebook_prune/index.py", "codebook_builder/faiss_ops.py"},
    "transformers": {"runtime/codebook_prune/adapters/loading.py"},
    "av": {"runtime/codebook_prune/video.py"},
    "webdataset": {"codebook_builder/shards.py"},
    "fsspec": {"schemas/codebook_schemas/object_store.py"},
}
FILES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_walk_finds_the_code() -> None:
    assert len(FILES) > 20
    assert {name for name, _ in FILES} == set(PACKAGES)


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_point_down(package: str, path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert FLOOR.get(top, -1) <= FLOOR[package], f"{path} imports {name} from a floor above"
        if package != "jobs":
            assert top not in ("tests", "benchmarks"), f"{path} imports {name}"


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda x: x.name if isinstance(x, Path) else x)
def test_heavy_libraries_stay_in_their_file(package: str, path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in ONLY_IN or relative in ONLY_IN[top], f"{relative} imports {name}, allowed only in {ONLY_IN[top]}"


def test_no_module_is_a_drawer() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [path for _, path in FILES if path.stem in banned]


def test_no_pickle_and_no_remote_code() -> None:
    for _, path in FILES:
        source = path.read_text()
        assert not {"pickle", "cloudpickle", "dill"} & {n.split(".")[0] for n in imports(path)}, path
        assert "trust_remote_code=True" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def test_functions_do_not_take_more_than_eight_parameters() -> None:
    for _, path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]
                assert len(names) <= 8, f"{path}:{node.lineno} {node.name} takes {len(names)} parameters"
