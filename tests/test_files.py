"""Checkpoints that are broken at random: each is refused in one line, or it is taken and of use."""

import copy
import shutil

import numpy as np
import pytest
import torch
from test_clips import files_below, mutate

from conftest import SMALL, random_inputs, random_model
from grow import grow_state
from run import DEFAULTS, Checkpoint, history_tree, load_checkpoint, save_checkpoint
from text_encoder import encoders_of

FILES = ("model.safetensors", "train_state.json", "train_state.safetensors")
TRAINED = {"train": "basic", "steps": 40, "captions": "short", "tune": "all", "seed": 0}
GROWN = {"grow": "depth", "add": 1, "changed": {"depth": [2, 3]}}


def good_checkpoint():
    """A checkpoint with all that one may hold."""
    model = random_model()
    optimizer_state = {}
    for name, p in model.named_parameters():
        p = p.detach()
        optimizer_state[name] = {"step": torch.tensor(40.0), "exp_avg": p / 2, "exp_avg_sq": p.square()}
    metadata = {**DEFAULTS, "history": [TRAINED, GROWN], "new": ["final.bias"], "flops": 10**12}
    state = dict.fromkeys(("seconds", "flops_before", "lr_before", "lr", "base_lr"), 0.5)
    state |= {"step": 40, "total": 60, "minutes": None, "losses": [0.5, 0.25]}
    state |= {"data": "abc", "skipped": ["a.mp4"]}
    return Checkpoint(model, copy.deepcopy(model), optimizer_state, metadata, state)


def use(checkpoint):
    """What sample.py, train.py and grow.py do with it."""
    config = checkpoint.ema.config
    encoders_of(checkpoint.metadata, config.llm_dim)
    history_tree(checkpoint.metadata["history"])
    if config == SMALL:
        assert checkpoint.ema(*random_inputs(config)).shape == (2, 3, 4, 16, 16)
    grow_state(checkpoint, "depth", add=1)


def fuzz(folder, count, seed=0):
    """Break and open `count` checkpoints -> how many were refused. Nothing may be written."""
    rng, refused = np.random.default_rng(seed), 0
    good, work = folder / "good", folder / "work"
    save_checkpoint(good, good_checkpoint())
    use(load_checkpoint(good))
    for trial in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(good, work)
        file = work / FILES[trial % 3]
        most = [None, 4000][rng.integers(2)]  # in the header, which is text, or anywhere
        file.write_bytes(mutate(rng, file.read_bytes(), most))
        before = files_below(folder)
        try:
            use(load_checkpoint(work))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, (trial, error)
            refused += 1
        assert files_below(folder) == before, trial
    return refused


def test_broken_checkpoints(tmp_path):
    assert 30 < fuzz(tmp_path, 60) < 60


@pytest.mark.slow
def test_more_broken_checkpoints(tmp_path):
    assert 150 < fuzz(tmp_path, 300, seed=1) < 300
