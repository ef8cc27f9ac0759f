"""The codebook-prune command as a user runs it: real processes, real files, the shipped reference checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codebook_folder import write_codebook
from conftest import noise_image
from PIL import Image
from transformers import LlavaProcessor
from transformers.utils import logging

from codebook_prune import Codebook, CodebookDiversityPruner, CodebookPruner, DivPrunePruner, PyramidPruner, answer
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.cli import main
from reference_vlm import CHECKPOINT

logging.disable_progress_bar()  # the command does it through the environment, before transformers is imported
COMMAND = str(Path(sys.executable).with_name("codebook-prune"))
ASK = [
    "--model", str(CHECKPOINT), "--prompt", "What color is the circle?", "--max-new-tokens", "4", "--device", "cpu",
]  # fmt: skip
TIMES = dict.fromkeys(("prefill_ms", "prune_ms", "total_ms"), 0)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, reference: tuple[Any, Any]) -> Path:
    """A folder with two images and a codebook made of tokens of a third."""
    folder = tmp_path_factory.mktemp("cli")
    for name, size in (("one.png", (96, 96)), ("two.jpg", (150, 90)), ("three.png", (96, 96))):
        noise_image(len(name), size).save(folder / name)
    model, processor = reference
    inputs = processor(images=Image.open(folder / "three.png"), text="<image>", return_tensors="pt")
    tokens = adapter_for(model).encode(inputs).embeddings
    write_codebook(folder / "codebook", model, tokens[::20])
    return folder


def arguments(place: Path, *more: str, files: tuple[str, ...] = ("one.png",), codebook: str = "codebook") -> list[str]:
    paths = [str(place / name) for name in files]
    base = ["--codebook", str(place / codebook), *ASK]
    return ["image", *paths, *base, *more]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)


def test_json_of_two_images_is_what_the_library_does(place: Path, reference: tuple[Any, Any]) -> None:
    done = run(*arguments(place, "--keep-tokens", "20", "--compare", "--json", files=("one.png", "two.jpg")))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["one.png", "two.jpg"]
    model, processor = reference
    pruner = CodebookDiversityPruner(Codebook.from_pretrained(place / "codebook"), keep_tokens=20)
    text = "USER: <image>\nWhat color is the circle? ASSISTANT:"
    for line in lines:
        inputs = processor(images=Image.open(line["file"]).convert("RGB"), text=text, return_tensors="pt")
        with pruner(model):
            pruned = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        plain = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        start = inputs["input_ids"].shape[1]
        answers = [processor.decode(out[0, start:], skip_special_tokens=True) for out in (pruned, plain)]
        assert [line["answer"], line["unpruned"]["answer"]] == [answer.strip() for answer in answers]
        assert (line["tokens_before"], line["tokens_after"]) == (144, 20)
        assert 0 < line["prune_ms"] < line["prefill_ms"] < line["total_ms"] + line["prefill_ms"]
        assert line["unpruned"]["prefill_ms"] > 0
        assert "overlay" not in line


def test_the_table_names_everything(place: Path) -> None:
    done = run(*arguments(place, "--keep-ratio", ".11", "--compare", "--positions", "original", "--dtype", "float32"))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("answer", "tokens", "prefill ms", "prune ms", "total ms", "16 of 144", "unpruned", "one.png"):
        assert word in done.stdout


def test_overlays_are_named_after_their_images(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.png").write_bytes((place / "two.jpg").read_bytes())
    options = ("--keep-tokens", "36", "--overlay", str(tmp_path / "out.png"), "--json")
    files = arguments(place, *options, files=("one.png", "two.jpg"))
    files.insert(3, str(tmp_path / "one.png"))
    with pytest.raises(SystemExit) as done:
        main(files)
    assert done.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["overlay"]).name for line in lines] == ["out-one.png", "out-two.png", "out-one-3.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "out-one-3.png", "out-one.png", "out-two.png"]
    picture = np.asarray(Image.open(tmp_path / "out-one.png")).astype(int)
    right = picture[:480, 488:968]
    coloured = np.ptp(right, axis=2).reshape(12, 40, 12, 40)[:, 5:-5, :, 5:-5].max((1, 3)) > 0
    assert int(coloured.sum()) == 36


def test_a_folder_is_answered_past_its_bad_files(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: tuple[Any, Any]
) -> None:
    for name in ("b.png", "d/e.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((place / "one.png").read_bytes())
    for name in (".hidden.png", "notes.txt", "a.png", "c.png"):
        (tmp_path / name).write_text("not an image")
    words = ["image", str(tmp_path), str(place / "*.jpg"), *ASK, "--pruner", "random(seed=3)", "--keep-ratio", ".25", "--json"]
    with pytest.raises(SystemExit) as done:
        main(words)
    out, err = capsys.readouterr()
    assert done.value.code == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.png", "b.png", "c.png", "e.PNG", "two.jpg"]
    assert ["error" in line for line in lines] == [True, False, True, False, False]
    assert lines[1] | {"file": lines[3]["file"]} | TIMES == lines[3] | TIMES
    assert [line["tokens_after"] for line in lines if "error" not in line] == [36] * 3
    errors = err.splitlines()
    assert [errors[0].endswith("a.png is not an image file in a known format"), len(errors)] == [True, 3]
    assert errors[2] == f"error: 2 of 5 files could not be used: {tmp_path}/a.png, {tmp_path}/c.png"


def test_images_of_one_prompt_have_budgets_of_their_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: tuple[Any, Any]
) -> None:
    options = ("--together", "--pruner", "divprune(keep_tokens=(5, 9))", "--overlay", str(tmp_path / "both.png"), "--json")
    with pytest.raises(SystemExit) as done:
        main(arguments(place, *options, files=("one.png", "two.jpg")))
    line = json.loads(capsys.readouterr().out)
    assert (done.value.code, [Path(name).name for name in line["files"]]) == (0, ["one.png", "two.jpg"])
    assert (line["tokens_before"], line["tokens_after"]) == (288, 14)
    assert Image.open(tmp_path / "both.png").size[1] > 2 * 480  # two rows: each image and what was kept of it
    model, processor = reference
    pictures = [Image.open(place / name).convert("RGB") for name in ("one.png", "two.jpg")]
    text = "USER: <image>\n<image>\nWhat color is the circle? ASSISTANT:"
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    with DivPrunePruner(keep_tokens=(5, 9))(model):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert line["answer"] == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_an_image_the_processor_refuses_is_a_bad_file_among_others(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LlavaProcessor.__call__

    def choosy(self: Any, images: list[Image.Image], **given: Any) -> Any:
        if images[0].size == (150, 90):
            raise ValueError("absolute aspect ratio is above 200,\nsays Qwen's")
        return real(self, images=images, **given)

    monkeypatch.setattr(LlavaProcessor, "__call__", choosy)
    with pytest.raises(SystemExit) as done:
        main(arguments(place, "--keep-tokens", "9", "--json", files=("two.jpg", "one.png")))
    out, err = capsys.readouterr()
    bad, good = map(json.loads, out.splitlines())
    assert (done.value.code, good["tokens_after"]) == (1, 9)
    assert bad["error"].endswith("two.jpg: this model's processor refuses it: absolute aspect ratio is above 200, says Qwen's")
    assert bad["error"] in err


def test_the_context_holds_what_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """144 visual tokens and 9 of text do not fit 100 positions, 20 and 9 do once they are renumbered."""
    real = answer.load_model

    def short(*given: Any, **more: Any) -> Any:
        model, processor = real(*given, **more)
        model.config.text_config.max_position_embeddings = 100
        return model, processor

    monkeypatch.setattr(answer, "load_model", short)
    for options, fits in ((("compact",), True), (("original",), False), (("compact", "--compare"), False)):
        with pytest.raises(SystemExit) as done:
            main(arguments(place, "--keep-tokens", "20", "--positions", *options))
        assert done.value.code == (0 if fits else 2)
        assert fits or "do not fit the 100 of this model: keep fewer tokens" in capsys.readouterr().err


def test_a_chain_by_its_spec_is_the_chain(place: Path, capsys: pytest.CaptureFixture[str], reference: tuple[Any, Any]) -> None:
    spec = "codebook(keep_ratio=0.5) | pyramid(ratios=[.5, .25, .1], rank=paper)"
    with pytest.raises(SystemExit):
        main(arguments(place, "--pruner", spec, "--json"))
    line = json.loads(capsys.readouterr().out)
    model, processor = reference
    book = Codebook.from_pretrained(place / "codebook")
    chain = CodebookPruner(book, keep_ratio=0.5) | PyramidPruner(ratios=(0.5, 0.25, 0.1), rank="paper")
    text = "USER: <image>\nWhat color is the circle? ASSISTANT:"
    inputs = processor(images=Image.open(line["file"]).convert("RGB"), text=text, return_tensors="pt")
    with chain(model):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert line["answer"] == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    counted = [line[f"tokens_{name}"] for name in ("before", "after", "final", "layer_averaged")]
    stats = chain.stats
    assert counted == [144, 72, *stats.tokens_final, stats.layer_averaged_tokens]
    assert stats.tokens_final == [7]


def test_compare_takes_turns_and_draws_them_all(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruners = ["--pruner", "uniform", "--pruner", "random(keep_tokens=9)", "--pruner", "pyramid"]
    words = ["compare", str(place / "one.png"), *pruners, *ASK, "--keep-tokens", "36", "--overlay", str(tmp_path / "all.png")]
    with pytest.raises(SystemExit) as done:
        main([*words, "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    results = found["results"]
    assert [result["pruner"] for result in results] == ["unpruned", "uniform", "random(keep_tokens=9)", "pyramid"]
    assert [(r["tokens_after"], r["tokens_final"]) for r in results] == [(144, 144), (36, 36), (9, 9), (144, 18)]
    assert all(result["prefill_ms"] > 0 and result["total_ms"] > 0 for result in results)
    assert [results[0]["prune_ms"], results[1]["prune_ms"] > 0] == [0, True]
    assert found["overlay"] == str(tmp_path / "all.png")
    picture = np.asarray(Image.open(tmp_path / "all.png")).astype(int)
    for number, kept in enumerate((144, 36, 9, 18)):
        shown = picture[:480, 488 * number : 488 * number + 480]
        coloured = np.ptp(shown, axis=2).reshape(12, 40, 12, 40)[:, 5:-5, :, 5:-5].max((1, 3)) > 0
        assert int(coloured.sum()) == kept
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        main(words[:-2])
    table = capsys.readouterr().out
    for word in ("unpruned", "random(keep_tokens=9)", "36 of 144", "144 -> 18 of 144", "prefill ms"):
        assert word in table


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--keep-ratio", ".1"), CodebookDiversityPruner),
        (("--threshold", ".5"), CodebookPruner),
        (("--keep-ratio", ".1", "--pruner", "codebook"), CodebookPruner),
    ],
)
@pytest.mark.parametrize("command", ["image", "compare"])
def test_the_default_pruner_is_ours_and_the_papers_with_a_threshold(
    command: str,
    options: tuple[str, str],
    kind: Any,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    reference: tuple[Any, Any],
) -> None:
    words = arguments(place, *options, "--json")
    with pytest.raises(SystemExit):
        main([command, *words[1:]])
    found = json.loads(capsys.readouterr().out)
    pruned = found if command == "image" else found["results"][1]
    budget = {"threshold": 0.5} if "--threshold" in options else {"keep_ratio": 0.1}
    model, processor = reference
    text = "USER: <image>\nWhat color is the circle? ASSISTANT:"
    inputs = processor(images=Image.open(place / "one.png").convert("RGB"), text=text, return_tensors="pt")
    pruner = kind(Codebook.from_pretrained(place / "codebook"), **budget)
    with pruner(model):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert pruned["answer"] == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert [pruned["tokens_after"]] == pruner.stats.tokens_after
    assert pruned.get("pruner") in (None, kind.__module__.removeprefix("codebook_prune.pruners."))


def test_a_threshold_and_the_reference_model_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(place, "--threshold", "1.5", "--json")
    words[words.index(str(CHECKPOINT))] = "reference"
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["tokens_before"], line["tokens_after"]) == (144, 144)


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("inspect", str(place / "codebook"))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("tiny/model", "llava", "128", "files verified"):
        assert word in done.stdout
    with pytest.raises(SystemExit):
        main(["inspect", str(place / "codebook"), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prototypes"], summary["dimension"], summary["files_verified"]) == (8, 128, 1)


def without(words: list[str], option: str) -> list[str]:
    place = words.index(option)
    return words[:place] + words[place + 2 :]


def bad_inputs(place: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    (folder / "words.png").write_text("not an image")
    (folder / "empty").mkdir()
    (folder / "cut.png").write_bytes((place / "one.png").read_bytes()[:5000])
    shutil.copytree(place / "codebook", folder / "damaged")
    data = bytearray((folder / "damaged/prototypes-00000.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "damaged/prototypes-00000.safetensors").write_bytes(data)
    shutil.copytree(place / "codebook", folder / "broken")
    (folder / "broken/manifest.json").write_text('{"format_version": 1')
    shutil.copytree(CHECKPOINT, folder / "other", copy_function=os.symlink)
    (folder / "other/config.json").unlink()
    (folder / "other/config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(place / "one.png", folder / "own.png")
    budget = ("--keep-tokens", "9")

    def on(path: Path, *more: str) -> list[str]:
        words = arguments(place, *more)
        return ["image", str(path), *words[2:]]

    def replaced(option: str, value: str) -> list[str]:
        words = arguments(place, *budget)
        words[words.index(option) + 1] = value
        return words

    return {
        "missing image": (on(folder / "no.png", *budget), "no.png does not exist"),
        "not an image": (on(folder / "words.png", *budget), "is not an image file"),
        "cut image": (on(folder / "cut.png", *budget), "is damaged or cut short"),
        "both images bad": (on(folder / "words.png", str(folder / "cut.png"), *budget), "none of the 2 files can be used"),
        "empty folder": (on(folder / "empty", *budget), "holds no file that ends in .avif, "),
        "no match": (on(folder / "*.tiff", *budget), "no file matches"),
        "no codebook given": (without(arguments(place, *budget), "--codebook"), "needs a codebook: give --codebook"),
        "no such pruner": (
            arguments(place, *budget, "--pruner", "magic"),
            "there is no pruner 'magic'; there are cdpruner, codebook, ",
        ),
        "no such parameter": (
            arguments(place, *budget, "--pruner", "random(sed=1)"),
            "random has no parameter 'sed'; it has keep_ratio, ",
        ),
        "two budgets in all": (
            arguments(place, *budget, "--pruner", "random(keep_ratio=.5)"),
            "random(keep_ratio=.5) holds its budget already: leave out keep_tokens",
        ),
        "no place for a budget": (arguments(place, *budget, "--pruner", "pyramid"), "pyramid takes no keep_tokens"),
        "no budget": (arguments(place), "no budget: give exactly one of keep_tokens, keep_ratio and threshold"),
        "two budgets": (arguments(place, *budget, "--threshold", "0.5"), "keep_tokens and threshold contradict each other"),
        "bad ratio": (arguments(place, "--keep-ratio", "1.5"), "in (0, 1]"),
        "no codebook": (replaced("--codebook", str(folder / "none")), "no codebook at"),
        "damaged codebook": (
            replaced("--codebook", str(folder / "damaged")),
            "SHA-256 of prototypes-00000.safetensors",
        ),
        "broken manifest": (replaced("--codebook", str(folder / "broken")), "manifest.json"),
        "no model": (replaced("--model", str(folder / "none")), "is neither a folder nor a Hub id"),
        "unsupported model": (replaced("--model", str(folder / "other")), "is not supported; supported: "),
        "empty model folder": (replaced("--model", str(place)), "cannot load model"),
        "device": (replaced("--device", "abacus"), "device abacus cannot be used"),
        "empty prompt": (replaced("--prompt", "  "), "the prompt is empty"),
        "placeholder": (replaced("--prompt", "what is <image>?"), "must not hold <image>"),
        "overlay format": (arguments(place, *budget, "--overlay", str(folder / "a.doc")), "ends in .png, .jpg, .jpeg or .webp"),
        "overlay folder": (arguments(place, *budget, "--overlay", str(folder / "no/a.png")), "does not exist"),
        "overlay on input": (on(folder / "own.png", *budget, "--overlay", str(folder / "own.png")), "would overwrite an input"),
        "inspect nothing": (["inspect", str(folder / "none")], "no codebook at"),
        "inspect damaged": (["inspect", str(folder / "damaged")], "the SHA-256"),
    }


def test_bad_input_gives_one_line_exit_code_2_and_no_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bad_inputs(place, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name, (words, message) in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capsys.readouterr()
        assert (name, stop.value.code, out) == (name, 2, "")
        assert err.startswith("error: "), name
        assert err.count("\n") == 1, name
        assert message in err, name
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_codebook_of_another_model_is_refused(place: Path, tmp_path: Path, reference: tuple[Any, Any]) -> None:
    write_codebook(tmp_path / "codebook", reference[0], torch.randn(3, 64))
    options = ("--keep-tokens", "9", "--overlay", str(tmp_path / "a.png"))
    done = run(*arguments(place, *options, codebook=str(tmp_path / "codebook")))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: codebook of tiny/model has dimension 64, the model has 128")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("words", [("image",), ("image", "--no-such-option"), ("nothing",)])
def test_usage_errors_exit_with_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_nothing_asked_for_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("Usage:")
    assert "image" in err


def test_an_interrupt_is_one_line_and_130(place: Path) -> None:
    words = [COMMAND, *arguments(place, "--keep-tokens", "9", "--json"), *[str(place / "one.png")] * 400]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["tokens_after"] == 9  # in the middle of its work
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert all(json.loads(line)["tokens_after"] == 9 for line in out.splitlines())
    assert out == "" or out.endswith("\n")


LIGHT = """
import sys
{action}
heavy = {{"torch", "transformers", "numpy", "PIL", "faiss", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "action",
    [
        "import codebook_prune; dir(codebook_prune); codebook_prune.__all__; codebook_prune.UserError",
        "from codebook_prune.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from codebook_prune.cli import main\ntry: main(['image', '--help'])\nexcept SystemExit: pass",
        "from codebook_prune.cli import main\ntry: main(['inspect', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_and_help_load_nothing_heavy(action: str) -> None:
    script = LIGHT.format(action=action)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves_and_others_do_not() -> None:
    import codebook_prune
    from codebook_prune.pruners import pruners

    assert all(getattr(codebook_prune, name).__name__ == name for name in codebook_prune.__all__)
    assert all(getattr(codebook_prune, cls.__name__) is cls for cls in pruners().values())
    with pytest.raises(AttributeError, match="no attribute 'PrunerManager'"):
        codebook_prune.PrunerManager  # noqa: B018
