"""Faults that users of such programs report: one name with two meanings, lines that cannot be printed, models
that load but cannot do their work, and other input that a program takes without a word.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file
from test_clips import lay_out, moving_square

import clips
import sample
import text_encoder
from clips import FolderDataset, scan
from conftest import (
    SMALL,
    random_model,
    resume_training,
    run_training,
    tiny_encoder,
    tiny_llm,
    word_tokenizer,
)
from grow import grow_llm
from machine import cache_dir
from run import load_model, save_model
from start import find_data
from text_encoder import TextEncoder, cached_features, make_encoder
from train import generator_of, parse_arguments
from video import is_marked, save_grid, write_gif, write_video

HERE = Path(__file__).parent.parent

# --------------------------------------------------------------------------------------------------------
# One name with two meanings


@pytest.mark.parametrize("name", ["basic", "rich", "both"])
def test_a_folder_that_is_called_like_a_set(tmp_path, monkeypatch, capsys, name):
    """With a slash it is a folder. Without one it is a folder too, if there is one, and that is said."""
    monkeypatch.chdir(tmp_path)
    assert find_data(name) == name
    with pytest.raises(ValueError, match="nor a folder"):
        find_data(f"{name}/")
    (tmp_path / name).mkdir()
    for given in (f"{name}/", f"./{name}", f"x/../{name}/"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert find_data(given) not in ("basic", "rich", "both")
    assert capsys.readouterr().out == ""
    assert parse_arguments(["--data", name, "--fps", "4"]).data == str(tmp_path / name)
    assert f"--data {name} is the folder ./{name}" in capsys.readouterr().out


def test_a_folder_that_is_called_like_an_encoder(tmp_path, monkeypatch, capsys):
    """The short name stays that of the installed encoder, since checkpoints hold it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert text_encoder.located("minilm/") == text_encoder.located("./minilm") == str(tmp_path / "minilm")
    assert capsys.readouterr().out == ""
    assert text_encoder.located("minilm") == "minilm"
    assert "note: minilm is the installed encoder; the folder is ./minilm" in capsys.readouterr().out


def test_a_run_on_a_folder_that_is_called_like_a_set(tmp_path, monkeypatch, encoder_name):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "basic", "a.gif", "b.gif")
    run = run_training("run", encoder_name, "--data basic/ --steps 2")
    assert json.loads((run / "args.json").read_text())["data"] == str(tmp_path / "basic")
    assert FolderDataset(scan("./basic")).captions == ["basic", "basic"]


def test_clips_are_found_from_elsewhere(tmp_path, monkeypatch, encoder_name):
    """A run on a folder that was given as relative is resumed in another directory. A run of an older version
    says that its folder is not there."""
    lay_out(tmp_path / "my", "a.gif", "b.gif")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = run_training("run", encoder_name, "--data my --steps 2").absolute()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume_training(run, "--steps 3")
    options = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**options, "data": "my"}))
    with pytest.raises(FileNotFoundError, match="there is no folder my"):
        resume_training(run, "--steps 4")


# --------------------------------------------------------------------------------------------------------
# Captions that are cut or mixed


def metadata(root, found, **files):
    """Write metadata files, by their endings -> captions and problems."""
    for ending, text in files.items():
        (root / f"metadata.{ending}").write_bytes(text if isinstance(text, bytes) else text.encode())
    captions, problems = clips.read_metadata(root, found)
    return {name: text for name, (text, _) in captions.items()}, dict(problems)


def test_commas_without_quotes_make_a_bad_row(tmp_path):
    text = 'file_name,text\na.mp4,a dog, black and white\nb.mp4,"a cat, black"\n'
    captions, problems = metadata(tmp_path, ["a.mp4", "b.mp4"], csv=text)
    assert captions == {"b.mp4": "a cat, black"}
    assert "needs quotes" in problems["metadata.csv, line 2"] and len(problems) == 1


@pytest.mark.parametrize(
    "row",
    ['a.mp4,"a dog', 'a.mp4,"a dog"s tail"', '"a.mp4,a dog'],
)
@pytest.mark.parametrize("quotes_below", [True, False])
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path, row, quotes_below):
    lines = ["file_name,text", row, "b.mp4,a cat", 'c.mp4,"a bird"', "d.mp4,a fish"]
    if not quotes_below:
        lines[3] = "c.mp4,a bird"
    captions, problems = metadata(tmp_path, [f"{letter}.mp4" for letter in "abcd"], csv="\n".join(lines))
    assert captions == {"b.mp4": "a cat", "c.mp4": "a bird", "d.mp4": "a fish"}
    assert list(problems) == ["metadata.csv, line 2"]


def test_many_open_quotes_take_no_longer(tmp_path):
    """The file has a row for each of 20,000 clips. Every row is looked at once."""
    names = [f"{i}.mp4" for i in range(20_000)]
    rows = "\n".join(f'{name},"open' if i % 3 == 0 else f"{name},shut" for i, name in enumerate(names))
    captions, problems = metadata(tmp_path, names, csv=f"file_name,text\n{rows}")
    assert (len(captions), len(problems)) == (13_333, 6667)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_metadata_in_other_encodings(tmp_path, ending, encoding):
    """The mark of UTF-8 is dropped. Other encodings are refused, by name and line."""
    row = {
        "csv": "file_name,text\na.mp4,caf\u00e9\n",
        "jsonl": '{"file_name": "a.mp4", "text": "caf\u00e9"}\n',
    }
    captions, problems = metadata(tmp_path, ["a.mp4"], **{ending: row[ending].encode(encoding)})
    if encoding == "utf-8-sig":
        assert captions == {"a.mp4": "caf\u00e9"} and not problems
    else:
        assert not captions and all(f"metadata.{ending}" in what for what in problems)
        assert all("UTF-" in why or "JSON" in why or "file_name" in why for why in problems.values())
    if encoding == "utf-16":
        assert problems == {f"metadata.{ending}": "it is UTF-16, not UTF-8"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_texts_beside_clips_in_other_encodings(tmp_path, encoding):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    (root / "a.txt").write_bytes("a caf\u00e9 \n at night".encode(encoding))
    scanned = scan(root)
    if encoding == "utf-8-sig":
        assert scanned.captions["a.gif"][0] == "a caf\u00e9 at night" and not scanned.problems
    else:
        (problem,) = scanned.problems
        assert problem[0] == "a.gif" and "a.txt: it" in problem[1] and "UTF-8" in problem[1]
        assert list(scanned.entries) == ["b.gif"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_prompts_in_other_encodings(tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a caf\u00e9\n\na cat\n".encode(encoding))
    args = sample.parse_arguments(["--prompts", str(file)])
    if encoding == "utf-8-sig":
        assert sample.read_prompts(args) == ["a caf\u00e9", "a cat"]
    else:
        with pytest.raises(ValueError, match=r"prompts\.txt cannot be read: it is (UTF-16, )?not UTF-8"):
            sample.read_prompts(args)


def test_a_prompt_that_is_not_utf8():
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        sample.read_prompts(sample.parse_arguments([os.fsdecode(b"caf\xe9")]))


def test_captions_that_are_cut_or_missing_are_counted(tmp_path, capsys):
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", "walks/d.gif")
    (root / "walks/d.txt").unlink()
    (root / "a.txt").write_text("long " * 1000)
    (root / "b.txt").write_text("a cat")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "c.gif", "text": "x" * 2001}))
    clips.check(root, tmp_path / "out", 8, 16, 8)
    said = capsys.readouterr().out
    assert "note: 2 captions are cut at 2000 characters: a.gif, c.gif\n" in said
    assert "note: 1 files have the name of their folder as caption: walks/d.gif\n" in said
    assert "skipped" not in said


def test_metadata_in_two_files_that_say_the_same(tmp_path):
    rows = (
        '{"file_name": "a.mp4", "text": "a  cat", "text_short": "cat"}\n{"file_name": "b.mp4", "text": "b"}'
    )
    text = "file_name,text\na.mp4,a cat\nb.mp4,another\n"
    captions, problems = metadata(tmp_path, ["a.mp4", "b.mp4"], csv=text, jsonl=rows)
    assert captions == {"a.mp4": "a cat", "b.mp4": "b"}
    assert list(problems) == ["metadata.csv, line 3"]
    assert clips.read_metadata(tmp_path, ["a.mp4"])[0] == {"a.mp4": ("a cat", "cat")}


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_other_normal_forms(tmp_path, on_disk, written):
    """As files come from a Mac to another system, or the other way."""
    names = [unicodedata.normalize(on_disk, name) for name in ("caf\u00e9.gif", "\u00fcber.gif")]
    root = lay_out(tmp_path / "my", *names)
    for file in root.glob("*.txt"):
        file.unlink()
    told = unicodedata.normalize(written, "caf\u00e9.gif")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": told, "text": "coffee"}))
    (root / unicodedata.normalize(written, "\u00fcber.txt")).write_text("above")
    scanned = scan(root)
    assert [text for text, _ in scanned.captions.values()] == ["coffee", "above"] and not scanned.problems
    assert clips.in_validation(told) == clips.in_validation(names[0])


# --------------------------------------------------------------------------------------------------------
# The project's own output as data


@pytest.mark.slow
def test_own_output_is_no_data(tmp_path, monkeypatch, capsys, encoder_name):
    """Previews, samples, runs and hidden folders in the folder of the clips are passed over with a note. So
    a second look finds what the first one found, and a run can be resumed."""
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "walk/c.mp4")
    monkeypatch.chdir(root)
    lay_out(root / ".trash", "d.gif")
    clips.check(".", Path("samples"), 8, 16, 8)
    assert "3 files" in capsys.readouterr().out
    write_video(Path("surf"), moving_square(1, 8, 16))
    save_grid("page.png", np.stack([moving_square(1, 8, 16)]), ["a"])
    clips.check(".", Path("samples"), 8, 16, 8)
    said = capsys.readouterr().out
    assert "3 files" in said and "skipped" not in said
    assert "note: 1 hidden folders are passed over: .trash\n" in said
    made = "page.png, surf.gif, surf.mp4, samples/preview-my.gif, samples/preview-my.png"
    assert f"note: 5 files that this project has made are passed over: {made}\n" in said
    run = run_training("runs/base", encoder_name, "--data . --steps 2")
    clips.check(".", Path("samples"), 8, 16, 8)
    assert "note: 1 runs of this project are passed over: runs/base\n" in capsys.readouterr().out
    write_video(run / "surf", moving_square(1, 8, 16))
    assert resume_training(run, "--steps 3") == run


def test_files_of_other_tools_are_not_marked(tmp_path):
    root = lay_out(tmp_path / "my", "a.gif", "b.mp4", "c.webm", "d")
    assert not any(is_marked(path) for path in root.rglob("*"))
    assert len(scan(root).entries) == 4 and not any("passed over" in note for note in scan(root).notes)


def test_what_is_passed_over_is_said(tmp_path):
    root = lay_out(tmp_path / "my", "a.gif")
    for name in ("b.ts", "c.WMV", "d.mpg", "notes.txt"):
        (root / name).write_bytes(b"x")
    lay_out(tmp_path, "elsewhere/e.gif")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    notes = scan(root).notes
    for name, ending in (("b.ts", ".ts"), ("c.WMV", ".wmv"), ("d.mpg", ".mpg")):
        assert f"1 {ending} videos, which are not read, are passed over: {name}" in notes
    assert "1 links to folders are passed over: link" in notes


# --------------------------------------------------------------------------------------------------------
# Lines that cannot be printed

PRINTS = """
import sys
from pathlib import Path
from machine import run_command
from tqdm import tqdm

def main():
    for i in range(5000):
        print("\\u2514\\u2500 \\u00e9 \\ud800 and a long line " * 9)
        print("\\u2514\\u2500", file=sys.stderr)
    for _ in tqdm(range(10)):
        pass
    tqdm.write("\\u2514\\u2500")
    Path("saved").write_text("all of it")

run_command(main)
"""


def python(cwd, code, environment=None, **how):
    """Code in a process of its own, in the folder `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), **(environment or {})}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, check=False, **how)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_character_stops_a_program(tmp_path, encoding):
    done = python(tmp_path, PRINTS, {"PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0 and (tmp_path / "saved").exists(), done.stderr[-300:]
    assert done.stdout.startswith({"utf-8": b"\xe2\x94\x94"}.get(encoding, rb"\u2514\u2500"))
    assert rb"\ud800" in done.stdout


@pytest.mark.slow
def test_nobody_reads_what_is_printed(tmp_path):
    """As with `| head`, also if errors go there too, and on a disk that is full."""
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    for where in ("| head -1", "2>&1 | head -1", "> /dev/full", "> /dev/full 2>&1", ">&- 2>&-"):
        line = f"{sys.executable} {script} {where}"
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert (tmp_path / "saved").exists(), where
        (tmp_path / "saved").unlink()
        assert done.returncode == 0 and b"Traceback" not in done.stderr and b"ignored" not in done.stderr
    with open("/dev/full", "w") as full:
        done = python(tmp_path, PRINTS, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "note: what is printed is lost: No space left on device" in done.stderr


@pytest.mark.parametrize("script", ["cost.py", "attention.py"])
def test_nobody_reads_what_a_chapter_prints(script):
    line = f"{sys.executable} {HERE / script} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_all_videos_are_written_on_an_ascii_console(tmp_path, encoder_name):
    config = replace(SMALL, text_dim=16)
    save_model(tmp_path, random_model(config).state_dict(), config, text_encoder=encoder_name)
    (tmp_path / "prompts.txt").write_text("caf\u00e9\n\u65e5\u672c\n", "utf-8")
    line = "sample.py --from . --prompts prompts.txt --steps 1 | true"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = f"{sys.executable} {HERE}/{line}"
    subprocess.run(argv, shell=True, cwd=tmp_path, env=environment, check=True)
    assert {path.name for path in (tmp_path / "samples").glob("*.gif")} == {
        "caf\u00e9.gif",
        "\u65e5\u672c.gif",
    }


# --------------------------------------------------------------------------------------------------------
# Parts that load but cannot do their work


def without_tokenizer(directory):
    """An encoder's directory with only config and weights."""
    for path in Path(directory).iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    return str(directory)


@pytest.mark.parametrize("kind", ["t5", "bert", "Llama", "Qwen2"])
def test_an_encoder_without_a_tokenizer(tmp_path, kind):
    make = tiny_encoder if kind in ("t5", "bert") else tiny_llm
    name = without_tokenizer(make(tmp_path, kind))
    with pytest.raises((OSError, ValueError), match=r"tokenizer|cannot load") as error:
        make_encoder(name, None if make is tiny_encoder else "last")
    assert len(str(error.value).splitlines()) == 1


def change_weights(directory, change):
    """Write the weights of an encoder again, as `change` makes them."""
    file = Path(directory) / "model.safetensors"
    weights = change(load_file(file))
    save_file(weights, file, {"format": "pt"})
    return str(directory)


def constant(value):
    """All layers normalize to a constant."""

    def change(weights):
        return {name: torch.full_like(weight, value) for name, weight in weights.items()}

    return change


@pytest.mark.parametrize(
    "value, why", [(0.0, "are zero"), (float("nan"), "are not finite"), (1.0, "are the same")]
)
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_features_that_say_nothing(tmp_path, monkeypatch, value, why, kind):
    name = change_weights(tiny_encoder(tmp_path / "encoder", kind), constant(value))
    if why == "are the same":
        class_of = TextEncoder.__call__

        def always_the_same(encoder, texts):
            return class_of(encoder, ["a cat"] * len(texts))

        monkeypatch.setattr(TextEncoder, "__call__", always_the_same)
    with pytest.raises(ValueError, match=why):
        cached_features(["a red cat", "a cat surfing"], name)


def test_features_of_an_llm_that_are_not_finite(tmp_path):
    name = change_weights(tiny_llm(tmp_path / "llm"), constant(float("nan")))
    with pytest.raises(ValueError, match="are not finite"):
        cached_features(["a red cat"], name, "last")


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_weights_that_are_missing(tmp_path, kind):
    """transformers makes them up."""

    def half(weights):
        return {
            name: weight
            for name, weight in weights.items()
            if "layer.1" not in name and "block.1" not in name
        }

    name = change_weights(tiny_encoder(tmp_path / "encoder", kind), half)
    with pytest.raises(ValueError, match=r"\d+ weights of .* are missing"):
        TextEncoder(name)


def test_the_tokenizer_of_another_model(tmp_path):
    directory = tiny_encoder(tmp_path / "encoder", "bert")
    tokenizer = word_tokenizer(["<unk>", "</s>", *map(str, range(50)), "a", "red", "cat"], eos_token="</s>")
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match="has more tokens than its model"):
        TextEncoder(directory)


# --------------------------------------------------------------------------------------------------------
# Machines and options


def test_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELGROW_CACHE")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    path = cache_dir()
    assert path.parent == tmp_path and path.is_dir() and path == cache_dir()
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(OSError, match="belongs to another user: set MODELGROW_CACHE"):
        cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what was set is taken back


def forbidden(place, *content):
    raise PermissionError(13, "Permission denied", str(place))


def test_the_cache_of_another_user(tmp_path, monkeypatch):
    """It is of use if all is decoded."""
    root = lay_out(tmp_path / "my", "a.gif", "b.gif")
    before = FolderDataset(scan(root))
    monkeypatch.setattr(clips, "write_cache", forbidden)
    after = FolderDataset(scan(root))
    assert after.names == before.names and torch.equal(after.batch([0]), before.batch([0]))
    lay_out(root, "c.gif")
    with pytest.raises(PermissionError):
        scan(root)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--guidance nan", "--guidance is nan"),
        ("--guidance inf", "--guidance is inf"),
        ("--guidance -1", "--guidance is -1"),
        ("--interval 0.6 0", "--interval is 0.6 0; it must be two timesteps"),
        ("--interval 0 nan", "--interval is 0 nan"),
        ("--interval 0 2", "--interval is 0 2"),
    ],
)
def test_numbers_of_a_sample_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        sample.parse_arguments(["a cat", *options.split()])


@pytest.mark.parametrize("fps", [1, 7.5, 8, 12, 24, 30, 50])
def test_a_gif_lasts_as_long_as_its_clip(tmp_path, fps):
    """GIF counts in hundredths of a second. The times are read back from the file."""
    frames = np.random.default_rng(0).integers(0, 255, (48, 8, 8, 3), np.uint8)
    write_gif(tmp_path / "a.gif", frames, fps)
    with Image.open(tmp_path / "a.gif") as gif:
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert len(times) == 48 and sum(times) == pytest.approx(48_000 / fps, abs=5)
    assert max(times) - min(times) <= 10


def numbers_of_a_step(seed):
    """What a training draws."""
    return torch.rand(4, generator=generator_of(seed, 7, "cpu"))


def noise_of_a_sample(seed):
    """What sample.py begins with."""
    return sample.initial_noise(seed, 0, (4,))


def weights_of_a_branch(seed):
    """What --grow llm draws."""
    return grow_llm(random_model(), 8, seed).llm_embed.up.weight


@pytest.mark.parametrize("draw", [numbers_of_a_step, noise_of_a_sample, weights_of_a_branch])
@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 2, 10**30, -1])
def test_any_number_is_a_seed(seed, draw):
    """The same number gives the same noise, and the next number another one."""
    assert torch.equal(draw(seed), draw(seed)) and not torch.equal(draw(seed), draw(seed + 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ("--preset nano --from a", "--preset is for a new model"),
        ("--rank 4 --from a", "--rank is for --tune lora"),
        ("--rank 4 --tune new --from a", "--rank is for --tune lora"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(options.split())


def test_a_model_without_an_llm_has_no_share_of_captions_for_it(tmp_path, encoder_name):
    """A run of an older version that has one is resumed."""
    with pytest.raises(ValueError, match="--drop-text is for a model that reads with an LLM"):
        run_training(tmp_path / "a", encoder_name, "--drop-text 0.3")
    run = run_training(tmp_path / "a", encoder_name, "--steps 2")
    options = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**options, "drop_text": 0.3}))
    resume_training(run, "--steps 3")


def test_a_failed_start_leaves_no_folder(tmp_path, encoder_name):
    """A folder that the user has made stays, as does what is in it."""
    out = tmp_path / "runs" / "a"
    for content in (None, "notes.txt"):
        if content:
            out.mkdir(parents=True)
            (out / content).write_text("")
        with pytest.raises(ValueError, match="size is 30"):
            run_training(out, encoder_name, "--size 30")
        assert out.exists() == (content == "notes.txt")
    assert not (tmp_path / "runs" / "a" / "checkpoint").exists()


def test_the_hub_is_not_waited_for(monkeypatch):
    """Where nobody answers, a Hub id that was never loaded is refused after one request."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        calls = []
        listener = threading.Thread(target=hang_up, args=(hub, calls), daemon=True)
        listener.start()
        with pytest.raises(OSError, match=r"cannot load 'no/such' .*the Hub cannot be reached"):
            TextEncoder("no/such")
        hub.shutdown(socket.SHUT_RDWR)
    listener.join()
    assert len(calls) <= 2  # more retries would wait


def hang_up(server, calls):
    """Answer no call, and note who called, until the server is closed."""
    with contextlib.suppress(OSError):
        while True:
            connection, caller = server.accept()
            calls.append(caller)
            connection.close()


# --------------------------------------------------------------------------------------------------------
# What is held out


def test_held_out_files_are_named(tmp_path):
    names = [f"{i}.gif" for i in range(200)]
    held_out = [name for name in names if clips.in_validation(name)]
    kept = [name for name in names if not clips.in_validation(name)]
    found = clips.split([*kept, held_out[0]])
    assert found == (
        kept,
        held_out[:1],
        f"1 of {len(kept) + 1} files is held out for validation: {held_out[0]}",
    )
    assert f"held out for validation: {held_out[0]}, {held_out[1]}" in clips.split([*kept, *held_out[:2]])[2]
    assert clips.split(names)[2] == f"{len(held_out)} of 200 files are held out for validation"
    for few in (kept, held_out):
        assert (
            clips.split(few) == (few, few, clips.split(few)[2])
            and "nothing is held out" in clips.split(few)[2]
        )


def test_the_share_that_is_held_out():
    names = [f"{i}.gif" for i in range(2000)]
    sides = [set(clips.split(names, share)[1]) for share in (0.01, 0.1, 0.3, 0.5)]
    assert sides[0] < sides[1] < sides[2] < sides[3]
    assert [round(len(side) / 2000, 1) for side in sides] == [0.0, 0.1, 0.3, 0.5]
    assert clips.split(names, 0)[:2] == (names, names)


def test_training_on_all_clips(tmp_path, encoder_name, capsys):
    names = [f"{i}.gif" for i in range(40)]
    held_out = next(name for name in names if clips.in_validation(name))
    kept = [name for name in names if not clips.in_validation(name)]
    root = lay_out(tmp_path / "my", *kept[:2], held_out)
    run_training(tmp_path / "a", encoder_name, f"--data {root} --steps 2")
    assert f"note: 1 of 3 files is held out for validation: {held_out}\n" in capsys.readouterr().out
    run = run_training(tmp_path / "b", encoder_name, f"--data {root} --steps 2 --validation 0")
    assert "note: nothing is held out" in capsys.readouterr().out
    resume_training(run, "--steps 3")
    assert len(FolderDataset(scan(root), validation=0)) == 3
    for options, message in (
        (f"--data {root} --validation 0.6", "it must be from 0 .train on all. to 0.5"),
        ("--validation 0", "is for a folder of clips"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments(options.split())


# --------------------------------------------------------------------------------------------------------
# Encoders of other kinds

T5_SIZES = {"vocab_size": 7, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SIZES = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def save_kind(directory, kind):
    """A random model of a kind, with the tokenizer of the tiny encoders -> its name."""
    import transformers as tf

    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    if kind in ("UMT5", "MT5"):
        config = getattr(tf, f"{kind}Config")(**T5_SIZES, decoder_start_token_id=0)
        model = getattr(tf, f"{kind}ForConditionalGeneration")(config)
    elif kind == "Gemma3":
        text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
        model = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=vision))
    elif kind == "CLIP":
        text = {**SIZES, "max_position_embeddings": 16, "eos_token_id": 1}
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    elif kind == "Mamba":
        sizes = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
        model = tf.MambaForCausalLM(tf.MambaConfig(**sizes))
    else:
        model = tf.ViTModel(
            tf.ViTConfig(**{name: value for name, value in vision.items() if name != "vocab_size"})
        )
    model.save_pretrained(directory)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "surfing"]
    tokenizer = word_tokenizer(words, pad_token="<pad>", eos_token="</s>", model_max_length=6)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", ["UMT5", "MT5", "Gemma3", "CLIP", "Mamba"])
def test_encoders_of_other_kinds_work(tmp_path, kind):
    """UMT5 is that of Wan. Of a multimodal model or of CLIP, the text half reads."""
    torch.manual_seed(0)
    encoder = TextEncoder(save_kind(tmp_path, kind))
    features, mask = encoder(["a red cat", "a cat", ""])
    assert features.shape == (3, 4, 16) and encoder.dim == 16 and mask.sum(1).tolist() == [4, 3, 1]
    assert len(cached_features(["a red cat"], encoder.name).flat) == 5


def test_a_multimodal_llm_works(tmp_path):
    torch.manual_seed(0)
    features, _ = make_encoder(save_kind(tmp_path, "Gemma3"), "mean")(["a red cat", "a cat"])
    assert features.shape[2] == 16 and features.isfinite().all()


@pytest.mark.parametrize(
    "kind, layers, message",
    [
        ("UMT5", "last", "it is no LLM; it can be given as --text"),
        ("CLIP", "last", "it is no LLM"),
        ("Mamba", "last", "can be no --llm"),
        ("ViT", None, "is of a kind that cannot read prompts"),
    ],
)
def test_other_kinds_are_refused_in_one_line(tmp_path, kind, layers, message):
    name = save_kind(tmp_path, kind)
    with pytest.raises((ValueError, OSError), match=message) as error:
        make_encoder(name, layers)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_an_encoder_is_found_from_elsewhere(tmp_path, monkeypatch):
    """Its directory is given as relative, and the model is continued from and sampled in another one."""
    tiny_encoder(tmp_path / "encoder", "bert")
    tiny_llm(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    run_training("run", "encoder", "--steps 2")
    run_training("grown", "encoder/", "--from run --grow llm --llm ./llm --data basic --steps 2")
    metadata = load_model(tmp_path / "grown")[1]
    assert metadata["text_encoder"] == str(tmp_path / "encoder") and metadata["llm"] == str(tmp_path / "llm")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sample.main(["a cat", "--from", "../grown", "--steps", "1"])
    assert (tmp_path / "elsewhere" / "samples" / "a-cat.gif").exists()
    assert text_encoder.located("minilm") == "minilm" and text_encoder.located("a/b") == "a/b"
