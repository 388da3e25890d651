"""Machines other than those on which this was written: what a notebook, a cluster, a container or somebody
else's account does differently. Most of it is imitated here, since none of them is at hand.
"""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

import machine
import text_encoder
from conftest import random_model
from lab import reader
from run import Checkpoint, Run, load_checkpoint, save_checkpoint

HERE = Path(__file__).parent.parent


def trained(directory):
    """Write a checkpoint with the optimizer state of one parameter."""
    model = random_model()
    state = {"step": torch.tensor(3.0)}
    state |= {kind: torch.zeros_like(model.final.bias) for kind in ("exp_avg", "exp_avg_sq")}
    numbers = dict.fromkeys(("seconds", "flops_before", "lr_before", "lr", "base_lr"), 0.0)
    save_checkpoint(directory, Checkpoint(model, model, {"final.bias": state}, {}, {"step": 3, **numbers}))


def test_a_loaded_checkpoint_may_be_removed(tmp_path):
    """Nothing of it stays mapped. On networks' file systems a mapped file that is removed leaves a hidden one
    in the folder, which then cannot be replaced."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not tell")
    trained(tmp_path / "run/checkpoint")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.optimizer_state["final.bias"]["step"] == 3
    assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_if_the_umask_lets_them(tmp_path, monkeypatch, umask, mode):
    monkeypatch.setattr(reader, "train_reader", lambda *_, **__: torch.nn.Linear(2, 2))
    before = os.umask(umask)
    try:
        trained(tmp_path / "checkpoint")
        machine.write_cache(tmp_path / "cache.safetensors", {"a": torch.zeros(2)})
        reader.main(["--out", str(tmp_path / "reader.safetensors")])
    finally:
        os.umask(before)
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(files) == 4
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_a_folder_that_cannot_be_written_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODELGROW_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match="set MODELGROW_CACHE to a folder"):
        machine.cache_dir()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match=re.escape(f"{tmp_path} cannot be locked (No locks available)")):
        Run(tmp_path).__enter__()


def test_a_file_system_that_cannot_wait_for_folders(tmp_path, monkeypatch):
    """Files must be on the disk; for folders it is enough to try."""

    def refuse(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    machine.fsync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        machine.fsync(tmp_path / "file")


def test_a_command_that_a_notebook_starts(tmp_path):
    """The kernel names a backend of matplotlib that the environment of the command need not have."""
    code = "import machine, run; from pathlib import Path; machine.run_command("
    code += "lambda: run.plot_losses(Path('loss.png'), [{'step': 1, 'loss': 1.0}], []))"
    env = {**os.environ, "MPLBACKEND": "of_a_notebook", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").is_file()


def test_a_torchvision_for_another_torch(monkeypatch, tmp_path):
    """transformers imports it if it is there, and says that the model cannot be imported."""
    import transformers

    def refuse(*_, **__):
        raise ModuleNotFoundError("Could not import module 'BertModel'")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"cannot load .*'BertModel'; .* pip uninstall torchvision"):
        text_encoder.TextEncoder(str(tmp_path))
