"""Faults that users of such programs report: one name with two meanings, lines that cannot be printed, models
that load but cannot do their work, and other input that a program takes without a word.
"""

import json

import pytest
from test_clips import lay_out

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
