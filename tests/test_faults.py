"""Faults that users of such programs report: one name with two meanings, lines that cannot be printed, models
that load but cannot do their work, and other input that a program takes without a word.
"""

import json
import os
import unicodedata

import pytest
from test_clips import lay_out

import clips
import sample
from clips import FolderDataset, scan
from conftest import run_training
from start import find_data
from train import parse_arguments

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
    assert parse_arguments(["--data", name, "--fps", "4"]).data == f"./{name}"
    assert f"--data {name} is the folder ./{name}" in capsys.readouterr().out


def test_a_run_on_a_folder_that_is_called_like_a_set(tmp_path, monkeypatch, encoder_name):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "basic", "a.gif", "b.gif")
    run = run_training("run", encoder_name, "--data basic/ --steps 2")
    assert json.loads((run / "args.json").read_text())["data"] == "./basic"
    assert FolderDataset(scan("./basic")).captions == ["basic", "basic"]


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
    root = lay_out(tmp_path / "my", "a.gif", "b.gif", "c.gif", "d.gif")
    (root / "a.txt").write_text("long " * 1000)
    (root / "b.txt").write_text("a cat")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "c.gif", "text": "x" * 2001}))
    clips.check(root, tmp_path / "out", 8, 16, 8)
    said = capsys.readouterr().out
    assert "note: 2 captions are cut at 2000 characters: a.gif and 1 more\n" in said
    assert "note: 1 clips have the name of their folder as caption: d.gif\n" in said
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
    told = unicodedata.normalize(written, "caf\u00e9.gif")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": told, "text": "coffee"}))
    (root / unicodedata.normalize(written, "\u00fcber.txt")).write_text("above")
    scanned = scan(root)
    assert [text for text, _ in scanned.captions.values()] == ["coffee", "above"] and not scanned.problems
    assert clips.in_validation(told) == clips.in_validation(names[0])
