"""The commands as a user runs them: what sample.py writes and says, the README's path, errors in one line.

`command` runs a script in a child of a server that has imported torch already, in an empty folder.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_clips import moving_square, write_clip

import run as run_module
import sample
import text_encoder
import train
from clips import in_validation
from conftest import CHILDREN, SMALL, brief, random_model, tiny_encoder, tiny_llm
from decode import decode
from machine import run_command
from run import history_tree, load_model, save_model
from video import write_gif

HERE = Path(__file__).parent.parent


def command(line, cwd, **environment):
    """`python LINE` in the folder `cwd` -> what it said. Words in quotes may hold spaces."""
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    files = [cwd / ".stdout", cwd / ".stderr"]
    child = CHILDREN.Process(target=run_script, args=(words, cwd, {**os.environ, **environment}, files))
    child.start()
    child.join(600)
    child.kill()  # if it takes too long
    child.join()
    said = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess(words, child.exitcode, *said)


def run_script(words, cwd, environment, files):
    """What the child does."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(str(HERE / words[0]), run_name="__main__")


def succeed(line, cwd):
    """`command`, which must end well -> what it printed."""
    done = command(line, cwd)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def files_below(folder):
    """The names of all files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, encoder_name):
    """A random model that reads with the tiny encoder."""
    directory, config = tmp_path_factory.mktemp("model"), replace(SMALL, text_dim=16)
    save_model(directory, random_model(config).state_dict(), config, text_encoder=encoder_name)
    return directory


@pytest.fixture(scope="module")
def llm_model_dir(tmp_path_factory, encoder_name):
    """A random model that reads with the tiny encoder and with a tiny LLM."""
    directory, config = tmp_path_factory.mktemp("model"), replace(SMALL, text_dim=16, llm_dim=16)
    llm = tiny_llm(tmp_path_factory.mktemp("llm"))
    encoders = {"text_encoder": encoder_name, "llm": llm, "llm_features": "last"}
    save_model(directory, random_model(config).state_dict(), config, **encoders)
    return directory


@pytest.fixture
def only_gifs(monkeypatch):
    """Leave out the MP4 files, which take most of the time."""

    def write(path, frames, fps):
        write_gif(path.with_name(f"{path.name}.gif"), frames, fps)
        return []

    monkeypatch.setattr(sample, "write_video", write)


def draw(out, source, prompts, options=""):
    """sample.py on a list of prompts -> the names of the videos."""
    out.mkdir(exist_ok=True)
    file = out.with_suffix(".txt")
    file.write_text("\n".join(prompts))
    argv = f"--prompts {file} --from {source} --out {out} --steps 1 {options}"
    sample.main(argv.split())
    return sorted(path.stem for path in out.glob("*.gif"))


def test_no_video_overwrites_another(tmp_path, model_dir, only_gifs):
    names = draw(tmp_path / "a", model_dir, ["a dog", "a dog", "a dog 2"])
    assert names == ["a-dog", "a-dog-2", "a-dog-2-2"]
    names = draw(tmp_path / "b", model_dir, ["a red cat", "a red cat 2"], "--num 2")
    assert names == ["a-red-cat", "a-red-cat-2", "a-red-cat-2-2", "a-red-cat-2-3"]
    names = draw(tmp_path / "c", model_dir, ["a dog 2", "a dog", "A dog!"])
    assert names == ["a-dog", "a-dog-2", "a-dog-3"]


def test_videos_of_a_call_differ(tmp_path, model_dir, only_gifs):
    draw(tmp_path / "a", model_dir, ["a red cat", "surfing"], "--num 2")
    contents = {path.read_bytes() for path in (tmp_path / "a").glob("*.gif")}
    assert len(contents) == 4


def test_more_videos_begin_with_the_same():
    """Video 0 of a prompt has its noise from the seed alone, whatever --num is."""
    shape = (3, 4, 16, 16)
    first, again = sample.initial_noise(7, 0, shape), sample.initial_noise(7, 0, shape)
    assert torch.equal(first, again)
    for seed, number in ((7, 1), (8, 0), (-1, 0), (10**30, 0)):
        assert not torch.equal(first, sample.initial_noise(seed, number, shape))


def test_seed_and_number_of_a_video_are_not_exchangeable():
    assert not torch.equal(sample.initial_noise(0, 1, (4,)), sample.initial_noise(1, 0, (4,)))


def test_options_reach_the_solver_and_the_video(tmp_path, encoder_name, monkeypatch):
    config = replace(SMALL, text_dim=16)
    save_model(tmp_path, random_model(config).state_dict(), config, text_encoder=encoder_name, fps=12)
    seen, written = [], []

    def solve(model, noise, prompt, null, steps, guidance, interval, method, progress):
        backend = model.blocks[0].attn.backend
        seen.append(
            (steps, guidance, list(interval), method, backend, int(null[1].sum()), int(prompt[1].sum()))
        )
        seen.append(noise)
        return noise

    monkeypatch.setattr(sample, "solve", solve)
    monkeypatch.setattr(
        sample, "write_video", lambda path, clip, fps: written.append((clip.shape, fps)) or []
    )
    line = f"--from {tmp_path} --out {tmp_path} --steps 3 --guidance 2 --interval 0.1 0.5 --method euler"
    line += " --seed 5 --frames 8 --size 32 --attention eager"
    sample.main(["a red cat", *line.split()])
    assert seen[0] == (3, 2, [0.1, 0.5], "euler", "eager", 1, 4)
    assert torch.equal(seen[1][0], sample.initial_noise(5, 0, (3, 8, 32, 32)))
    assert written == [((8, 32, 32, 3), 12)]


def test_which_model_is_used_is_said(tmp_path, model_dir, monkeypatch, capsys):
    """Named or not: here from a folder without runs, so the included one."""
    argv = ["a red cat", "--steps", "1"]
    sample.main([*argv, "--from", str(model_dir), "--out", str(tmp_path)])
    assert f"model: {model_dir}\n" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "PRETRAINED", model_dir)
    sample.main(argv)
    assert f"model: {model_dir}\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"a-red-cat.gif", "a-red-cat.mp4"}


def test_a_quick_run_that_is_passed_over_is_named(tmp_path, model_dir, monkeypatch, capsys):
    """If it is newer than the model that is taken."""
    monkeypatch.chdir(tmp_path)
    for name, age in (("quick/older", 9), ("real", 5), ("quick/base", 0)):
        checkpoint = Path("runs", name, "checkpoint")
        shutil.copytree(model_dir, checkpoint)
        os.utime(checkpoint / "model.safetensors", (time.time() - age,) * 2)
    assert sample.newest_model() == Path("runs/real/checkpoint")
    note = "note: runs/quick/base was made with --quick and is passed over; use --from runs/quick/base\n"
    assert capsys.readouterr().out == note


def test_what_was_read_is_not_read_again(tmp_path, llm_model_dir, monkeypatch, only_gifs):
    draw(tmp_path / "a", llm_model_dir, ["a red cat"])
    monkeypatch.setattr(text_encoder, "make_encoder", None)
    assert draw(tmp_path / "b", llm_model_dir, ["a red cat"]) == ["a-red-cat"]
    assert not (tmp_path / "b" / "a-red-cat.recaption.txt").exists()


def test_recaptions_lie_beside_the_videos(tmp_path, llm_model_dir, monkeypatch, only_gifs):
    """Each says what the LLM read: the prompt, and after it the longer version if that is faithful. Where a
    prompt is not re-captioned any more, none is left."""
    replies = {"a red cat": ("it is red", ""), "a dog": ("", "it names a cat")}
    monkeypatch.setattr(sample, "recaption", lambda llm, prompt: replies[prompt])
    out = tmp_path / "out"
    out.mkdir()
    (out / "a-red-cat.txt").write_text("a user's file")
    draw(out, llm_model_dir, ["a red cat", "a dog"], "--recaption --num 2")
    found = {path.name.split(".")[0]: path.read_text() for path in out.glob("*.recaption.txt")}
    assert found["a-red-cat"] == found["a-red-cat-2"] == "a red cat. it is red\n"
    assert found["a-dog"] == found["a-dog-2"] == "a dog\n"
    draw(out, llm_model_dir, ["a red cat"])
    assert not (out / "a-red-cat.recaption.txt").exists() and (out / "a-red-cat-2.recaption.txt").exists()
    assert (out / "a-red-cat.txt").read_text() == "a user's file"


def test_file_names():
    assert sample.file_name("A cat, surfing!") == "a-cat-surfing"
    assert sample.file_name("...") == sample.file_name("\ud800") == "video"
    for letter in ("cat ", "\N{GREEK SMALL LETTER PI}", "\N{CAT FACE}x"):
        name = sample.file_name(letter * 200)
        assert 77 <= len(name.encode()) <= 80


# --------------------------------------------------------------------------------------------------------
# The README's commands


def test_a_training_says_what_it_does_and_what_is_next(tmp_path, encoder_name, capsys):
    """Before all that takes long, and at its end. A run that is resumed has said it already."""
    run = tmp_path / "run"

    def said_by(out, options):
        train.train(train.parse_arguments(brief(out, encoder_name, f"--device cpu {options}")))
        return capsys.readouterr()

    said, bars = said_by(run, "--steps 2")
    first = "cpu: preset nano, batch 4, 2 steps; --preset, --batch and --steps change it\n"
    assert said.startswith(first) and said.count("change it") == 1
    last = f'the model is in {run}/checkpoint; next: python sample.py "YOUR PROMPT" --from {run}\n'
    assert said.endswith(f"\n{last}")
    assert "validating: " in bars and "drawing samples: " in bars
    assert "change it" not in said_by(run, "--steps 3 --resume").out
    said, _ = said_by(tmp_path / "more", f"--steps 1 --from {run}")
    assert f"cpu: {run}, batch 4, 1 steps; --batch and --steps change it\n" in said


@pytest.mark.slow
def test_train_grow_sample_evaluate(tmp_path):
    """With --quick, with the real text encoders, in an empty folder."""
    (tmp_path / "prompts.txt").write_text("A dog!\na dog\n\nred ball\n")
    succeed("train.py --quick --clips 32", tmp_path)
    assert "base: runs/quick/base\n" in succeed("train.py --quick --clips 32 --grow depth", tmp_path)
    succeed("train.py --quick --clips 32 --from runs/quick/base --grow llm", tmp_path)
    succeed('sample.py "a cat surfing" --from runs/quick/base-llm --steps 3 --recaption', tmp_path)
    assert "pretrained\n" in succeed("sample.py --prompts prompts.txt --num 2 --steps 2", tmp_path)
    succeed("-m lab.evaluate runs/quick/base --count 8 --steps 2", tmp_path)
    succeed("data.py --data rich --size 32", tmp_path)
    succeed('text_encoder.py "a cat surfing"', tmp_path)
    succeed('text_encoder.py "a cat surfing" --llm smollm2', tmp_path)
    succeed("align.py runs/quick/base", tmp_path)
    succeed("cost.py", tmp_path)
    succeed("grow.py runs/quick/base-depth --width 2 --out runs/wide", tmp_path)
    succeed("train.py --quick --clips 32 --from runs/quick/base-depth --tune lora", tmp_path)
    found = files_below(tmp_path)
    for run in ("base", "base-depth", "base-llm", "base-depth-lora"):
        assert f"runs/quick/{run}/checkpoint/model.safetensors" in found
    for run in ("wide", "swapped"):
        assert f"runs/{run}/checkpoint/model.safetensors" in found
    for name in ("samples/step_000020.gif", "loss.png", "evaluation.json"):
        assert f"runs/quick/base/{name}" in found
    for name in ("a-cat-surfing", "a-dog", "a-dog-2", "a-dog-3", "a-dog-4", "red-ball", "red-ball-2"):
        assert {f"samples/{name}.mp4", f"samples/{name}.gif"} <= found
    assert {"samples/a-cat-surfing.recaption.txt", "samples/preview-rich.png"} <= found


@pytest.mark.slow
def test_the_study_runs_in_an_empty_folder(tmp_path):
    succeed('-m lab.study --quick --parts growth --arms base "insert + llm"', tmp_path)
    succeed("-m lab.study --quick --report", tmp_path)
    found = files_below(tmp_path)
    assert "runs/study-quick/README.md" in found
    assert "runs/study-quick/growth/insert-llm-0.json" in found


@pytest.mark.slow
def test_growth_without_a_run_takes_the_model_that_comes_along(tmp_path):
    said = succeed("train.py --quick --grow depth --clips 16 --steps 2", tmp_path)
    assert re.search(r"^base: .*pretrained$", said, re.MULTILINE)
    before, after = re.search(r"loss ([\d.]+) before growth, ([\d.]+) after", said).groups()
    assert before == after
    model, _ = load_model(tmp_path / "runs" / "quick" / "pretrained-depth")
    assert model.config.depth == 8


CLIPS = {
    "a-fish.mp4": "a green fish in the city",
    "cat.gif": "a red cat in the snow",
    "boat.webm": "a blue boat at night",
    "pictures/ball": "a yellow ball in a meadow",
}


@pytest.mark.slow
def test_the_whole_path_on_real_clips(tmp_path):
    """A model that learns four clips by heart, is grown and continues, draws for each caption a video that is
    closer to its clip than to any other."""
    root, truth, rows = tmp_path / "my_clips", [], []
    for i, (name, caption) in enumerate(CLIPS.items()):
        assert not in_validation(name)
        truth.append(moving_square(20 + i, 8, 32))
        write_clip(root / name, truth[-1], 8)
        rows.append(json.dumps({"file_name": name, "text": caption}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "prompts.txt").write_text("\n".join(CLIPS.values()))
    checked = succeed("data.py --check my_clips --size 32", tmp_path)
    assert "4 files, 4 clips" in checked and "skipped" not in checked
    how = "--data my_clips --batch 8 --no-compile --warmup 20"
    succeed(f"train.py {how} --preset nano --steps 400 --every 400", tmp_path)
    succeed(f"train.py {how} --grow depth --steps 100 --every 100", tmp_path)
    succeed("sample.py --prompts prompts.txt --guidance 1", tmp_path)
    drawn = [
        mean_clip(tmp_path / "samples" / f"{sample.file_name(caption)}.mp4") for caption in CLIPS.values()
    ]
    distance = np.abs(np.stack(drawn)[:, None] - np.stack(truth)[None]).mean((2, 3, 4, 5))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3], distance
    history = load_model(tmp_path / "runs" / "base-depth")[1]["history"]
    assert len(history_tree(history).splitlines()) == 3


def mean_clip(path):
    """A video file -> its first 8 frames (T, H, W, 3), as numbers."""
    clip = decode(path, 8, 32, 8)[0][0]
    return clip.transpose(1, 2, 3, 0).astype(float)


# --------------------------------------------------------------------------------------------------------
# Errors of users


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a good model, a bad one, an LLM, and files that are in the way."""
    folder = tmp_path_factory.mktemp("folder")
    config = replace(SMALL, text_dim=16)
    weights, encoder = random_model(config).state_dict(), tiny_encoder(folder / "encoder", "bert")
    for name, told in {"good": config, "bad": replace(config, width=48)}.items():
        (folder / name).mkdir()
        save_model(folder / name, weights, told, text_encoder=encoder)
    branched = replace(config, llm_dim=16)
    (folder / "nameless").mkdir()
    save_model(folder / "nameless", random_model(branched).state_dict(), branched, text_encoder=encoder)
    tiny_llm(folder / "llm")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "taken").write_text("")
    return folder


USER_ERRORS = [
    ('sample.py ""', "the prompt is empty"),
    ('sample.py "\u200b \x07"', "the prompt is empty"),
    ("sample.py", "give one prompt"),
    ('sample.py "a cat" --from nowhere', "there is no checkpoint in nowhere"),
    ('sample.py "a cat" --from bad', "does not fit its own config"),
    ('sample.py "a cat" --from blank.txt', "are never loaded"),
    ('sample.py "a cat" --from good --frames 0', "frames is 0"),
    ('sample.py "a cat" --from good --size 30', "size is 30"),
    ('sample.py "a cat" --from good --steps 0', "--steps is 0"),
    ('sample.py "a cat" --from good --out taken', "taken"),
    ('sample.py "a cat" --from good --recaption', "needs a model that reads with an LLM"),
    ('sample.py "a cat" --from nameless --recaption', "names no LLM"),
    ('sample.py "a cat" --from good --device tpu', "there is no device 'tpu' here"),
    ("sample.py --from good --prompts blank.txt", "blank.txt has no prompt"),
    ("train.py --preset huge", "invalid choice"),
    ("train.py --no-such-option", "unrecognized arguments"),
    ("train.py --quick --out taken/run", "taken"),
    ("train.py --quick --out /proc/run", "/proc/run"),
    ("train.py --resume", "there is no run to resume in runs/base"),
    ("train.py --quick --device tpu", "there is no device 'tpu' here"),
    ("train.py --quick --text no/such-model", "cannot load 'no/such-model'"),
    ("train.py --quick --text llm", "can be an --llm, but no --text"),
    ("train.py --quick --from nowhere", "there is no checkpoint in nowhere"),
    ("train.py --quick --from good --tune new", "leaves nothing to train"),
    ("train.py --quick --from good --grow depth --tune lora", "still zero"),
    ("train.py --quick --from good --grow llm --llm no/such", "cannot load 'no/such'"),
    ("train.py --quick --from good --size 30", "size is 30"),
    ("train.py --quick --data good", "there are no clips in "),
    ("data.py --frames 0", "cannot render 0 frames"),
    ("data.py --check nowhere", "there is no folder nowhere"),
    ("grow.py good --width 2 --out taken", "is there already"),
    ("-m lab.evaluate nowhere", "there is no checkpoint in nowhere"),
    ("-m lab.evaluate --out scores.gif", "--out scores.gif is for the scores, as JSON"),
    ("-m lab.study --arms more", "no arm is called 'more'"),
    ("-m lab.study --report", "no results in results"),
]


def without_bars(text):
    """The lines of stderr that are not progress bars."""
    return [line for line in text.splitlines() if line and not re.search(r"%\||step/s\]", line)]


@pytest.mark.parametrize("line, words", USER_ERRORS)
def test_user_errors_are_one_line(folder, line, words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = command(line, folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 2, (done.stdout, done.stderr)
    said = without_bars(done.stderr)
    if said[0].startswith("usage:"):
        said = said[-1:]
    assert len(said) == 1 and "error: " in said[0] and words in said[0], done.stderr
    left = {path for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    assert left <= before.keys() and all(path.stat().st_mtime_ns == before[path] for path in left)


@pytest.mark.slow
def test_a_batch_that_does_not_fit(tmp_path, encoder_name):
    """It asks for 245 GB at once, which no allocator grants."""
    done = command(f"train.py --quick --text {encoder_name} --batch 10000000", tmp_path)
    assert done.returncode == 2
    assert re.fullmatch("error: out of memory: lower --batch .*", without_bars(done.stderr)[-1])


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("--size is 3"), 2, "error: --size is 3\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'\n"),
        (MemoryError(), 2, "error: out of memory: take less\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "error: out of memory: take less\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: take less\n"),
        (KeyboardInterrupt(), 130, "stopped; what was saved before is kept\n"),
    ],
)
def test_how_a_command_ends(capsys, error, status, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main, "take less")
    assert (end.value.code, capsys.readouterr().err) == (status, said)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_command(main)


def test_without_any_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "PRETRAINED", tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match=r"there is no trained model: run `python train\.py` first"):
        sample.main(["a cat"])
