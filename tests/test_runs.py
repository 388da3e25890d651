"""What a run leaves on disk survives kills and full disks, and does no harm when strangers made it.

A run that is killed, stopped or interrupted and then resumed is compared bit for bit with one that was not.
Headers, training states and pickles are made by hand, as an older version or an attacker would have.
"""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import decode
import flow
import parallel
import run as run_module
import train
import validate
from conftest import (
    SMALL,
    brief,
    numbers,
    random_model,
    resume_training,
    run_training,
    same_run,
    same_tensors,
    tiny_encoder,
    train_in_child,
    train_without_pictures,
    wait_for_lines,
    weights_of,
)
from data import ToyDataset
from run import (
    DEFAULTS,
    PRETRAINED,
    Checkpoint,
    Diverged,
    Run,
    Signals,
    find_checkpoint,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    option_name,
    save_checkpoint,
    save_model,
    write_atomically,
)
from text_encoder import TextEncoder

HERE = Path(__file__).parent.parent
STATE = {"step": 40, "seconds": 1.5, "flops_before": 0, "lr_before": 0.0, "lr": 0.001, "base_lr": 0.003}
BEGIN = {"step": 0, "seconds": 0.0}  # of a run that begins


def some_checkpoint(config=SMALL, **metadata):
    """A checkpoint in memory: weights, another EMA, and an optimizer state for every parameter."""
    model, ema = random_model(config), random_model(config, seed=1)
    optimizer_state = {}
    for name, p in model.named_parameters():
        p = p.detach()
        optimizer_state[name] = {"step": torch.tensor(40.0), "exp_avg": p / 2, "exp_avg_sq": p.square()}
    return Checkpoint(model, ema, optimizer_state, {**DEFAULTS, **metadata}, dict(STATE))


def write_header(directory, config, weights=None, **entries):
    """model.safetensors made by hand: a config (a dict) and other entries as JSON in the header."""
    directory.mkdir(exist_ok=True)
    header = {name: json.dumps(value) for name, value in {"config": config, **entries}.items()}
    save_file(weights or random_model().state_dict(), directory / "model.safetensors", header)


# --------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_model_comes_back_with_its_header(tmp_path):
    model, history = random_model(), [{"grow": "depth", "changed": {"depth": [2, 4]}}]
    save_model(tmp_path, model.state_dict(), SMALL, text_encoder="t5", history=history)
    loaded, metadata = load_model(tmp_path)
    assert metadata == {"text_encoder": "t5", "history": history, "flops": 0, "fps": 8, "new": []}
    assert loaded.config == SMALL and not loaded.training
    assert same_tensors(model.state_dict(), loaded.state_dict())


def test_a_checkpoint_comes_back(tmp_path):
    saved = some_checkpoint(fps=12.5, flops=10**15)
    save_checkpoint(tmp_path / "checkpoint", saved)
    loaded = load_checkpoint(tmp_path)
    assert same_tensors(saved.model.state_dict(), loaded.model.state_dict())
    assert same_tensors(saved.ema.state_dict(), loaded.ema.state_dict())
    assert saved.optimizer_state.keys() == loaded.optimizer_state.keys()
    for name, entry in saved.optimizer_state.items():
        assert same_tensors(entry, loaded.optimizer_state[name])
    assert (loaded.metadata, loaded.trainer_state) == (saved.metadata, saved.trainer_state)


def test_weights_alone_can_be_continued_from(tmp_path):
    save_model(tmp_path, random_model().state_dict(), SMALL)
    loaded = load_checkpoint(tmp_path)
    assert same_tensors(loaded.model.state_dict(), loaded.ema.state_dict())
    assert (loaded.optimizer_state, loaded.trainer_state) == ({}, {})


def test_two_checkpoints_are_not_mixed(tmp_path, monkeypatch):
    """A training saves after the first file was read. The next reading takes the new checkpoint whole."""
    save_checkpoint(tmp_path / "checkpoint", some_checkpoint())

    def meanwhile(path):
        monkeypatch.undo()
        loaded = load_model(path)
        later = some_checkpoint()
        later.trainer_state["step"] = 80
        save_checkpoint(tmp_path / "checkpoint", later)
        return loaded

    monkeypatch.setattr(run_module, "load_model", meanwhile)
    with pytest.raises(ValueError, match="was replaced by a training while it was read: try again"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path).trainer_state["step"] == 80


def test_other_files_are_refused(tmp_path):
    save_model(tmp_path, random_model().state_dict(), replace(SMALL, width=48))
    with pytest.raises(ValueError, match="does not fit its own config: blocks"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of this project: KeyError 'config'"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ValueError, match="is not a checkpoint of this project: SafetensorError"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_an_older_model_loads(tmp_path):
    """Its config has a refiner of no blocks; its header has entries of other tools."""
    write_header(
        tmp_path, {**asdict(SMALL), "llm_refiner": 0}, history=[], format="pt", code="print()", sha=[1]
    )
    model, metadata = load_model(tmp_path)
    assert model.config == SMALL
    assert metadata == DEFAULTS


def test_the_format_entry_need_not_be_json(tmp_path):
    header = {"config": json.dumps(asdict(SMALL)), "format": "pt", "note": "{"}
    save_file(random_model().state_dict(), tmp_path / "model.safetensors", header)
    assert load_model(tmp_path)[0].config == SMALL


def test_a_refiner_is_refused(tmp_path):
    write_header(tmp_path, {**asdict(SMALL), "llm_refiner": 2, "llm_dim": 8})
    with pytest.raises(ValueError, match=r"it has a refiner, which this version .*: commit \w+ can") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_an_older_training_state_loads(tmp_path):
    """The peak learning rate was called peak_at_128, and there were times of the last look at the losses."""
    save_checkpoint(tmp_path, some_checkpoint())
    state = {**STATE, "peak_at_128": 0.0021, "look_seconds": 0.25}
    state.pop("base_lr")
    (tmp_path / "train_state.json").write_text(json.dumps(state))
    loaded = load_checkpoint(tmp_path).trainer_state
    assert loaded["base_lr"] == 0.0021 and loaded["step"] == 40


HEADERS = [
    ({"depth": 10**9}, {}, "depth is 1000000000"),
    ({"width": -4}, {}, "width is -4"),
    ({"heads": 2.5}, {}, "heads is 2.5"),
    ({"colour": 1}, {}, "colour"),
    ({"frames": 65536, "size": 65536}, {}, "more pixels than a clip may have"),
    ({}, {"history": 5}, "TypeError"),
    ({}, {"history": [{"grow": "depth"}]}, "KeyError 'changed'"),
    ({}, {"history": [{"steps": "many", "train": "basic", "captions": "short"}]}, "steps is many"),
    ({}, {"history": [{"steps": 1.5, "train": "basic", "captions": "short"}]}, "steps is 1.5"),
    ({}, {"history": [{"steps": 10**30, "train": "basic", "captions": "short"}]}, "steps is 10000"),
    ({}, {"history": [{"steps": 1, "train": [], "captions": "short"}]}, "are unknown"),
    ({}, {"history": [{"steps": 1, "train": "basic", "captions": "poetic"}]}, "are unknown"),
    ({}, {"history": [{"grow": "depth", "changed": {}, "steps": "many"}]}, "at once"),
    ({}, {"history": [{"grow": "depth", "changed": {}, "train": "basic"}]}, "at once"),
    ({}, {"flops": math.nan}, "flops is nan"),
    ({}, {"fps": "8"}, "fps is 8"),
    ({}, {"fps": 0}, "fps is 0"),
    ({}, {"fps": 1e300}, "fps is 1e"),
    ({}, {"text_encoder": ["minilm"]}, "text_encoder must be a string"),
    ({}, {"llm": 3}, "llm must be a string"),
    ({}, {"new": {"a": 1}}, "new must be a list"),
    ({}, {"new": [1]}, "new must be a list"),
]


@pytest.mark.parametrize("config, entries, reason", HEADERS)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, config, entries, reason):
    write_header(tmp_path, {**asdict(SMALL), **config}, **entries)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{reason}") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


STATES = [
    ({"step": -1}, "step is -1"),
    ({"step": 1.0}, "step is 1.0"),
    ({"lr": math.inf}, "lr is inf"),
    ({"base_lr": None}, "base_lr is None"),
    ({"seconds": "1"}, "seconds is 1"),
    ({"total": "many"}, "total is many"),
    ({"losses": [1, 2]}, "losses must be a list of numbers"),
    ({"losses": 7}, "TypeError"),
    ({"skipped": [1]}, "skipped must be a list of names"),
]


@pytest.mark.parametrize("changes, reason", STATES)
def test_a_training_state_that_makes_no_sense_is_refused(tmp_path, changes, reason):
    save_checkpoint(tmp_path, some_checkpoint())
    (tmp_path / "train_state.json").write_text(json.dumps({**STATE, **changes}))
    with pytest.raises(ValueError, match=rf"train_state\.safetensors does not fit its model: .*{reason}"):
        load_checkpoint(tmp_path)


def test_training_tensors_that_do_not_fit_are_refused(tmp_path):
    save_checkpoint(tmp_path, some_checkpoint())
    file = tmp_path / "train_state.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    for broken in (whole[:1000], whole[:-1000], whole.replace(b"weights.final.bias", b"weights.final.bios")):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train_state\.safetensors does not fit"):
            load_checkpoint(tmp_path)
    bias = tensors["exp_avg.final.bias"]
    for wrong in (
        {"exp_avg.final.bias": bias[1:]},
        {"exp_avg.final.bias": bias.half()},
        {"step.x": bias[:1].clone()},
    ):
        save_file({**tensors, **wrong}, file)
        with pytest.raises(ValueError, match="does not fit its model"):
            load_checkpoint(tmp_path)
    tensors.pop("exp_avg_sq.final.bias")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit its model: KeyError 'exp_avg_sq'"):
        load_checkpoint(tmp_path)


class Bomb:
    """A pickle of it makes the folder `path` when it is opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_never_opened(tmp_path):
    bomb = {"weights": Bomb(tmp_path / "exploded")}
    for name in ("model.pt", "model.ckpt", "pytorch_model.bin", "checkpoint"):
        torch.save(bomb, tmp_path / name)
        with pytest.raises(ValueError, match="which may run any code, are never loaded"):
            load_checkpoint(tmp_path / name)
    shutil.copy(tmp_path / "model.pt", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path)
    encoder = Path(tiny_encoder(tmp_path / "encoder", "bert"))
    (encoder / "model.safetensors").unlink()
    shutil.copy(tmp_path / "model.pt", encoder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"cannot load .*safetensors"):
        TextEncoder(str(encoder))
    assert not (tmp_path / "exploded").exists()


# --------------------------------------------------------------------------------------------------------
# Which checkpoint is meant


def lay_out_run(root, name, age, place="checkpoint"):
    """An empty run whose checkpoint was written `age` seconds ago -> its checkpoint."""
    directory = root / name / place
    directory.mkdir(parents=True)
    (directory / "model.safetensors").touch()
    then = time.time() - age
    os.utime(directory / "model.safetensors", (then, then))
    return directory


def test_the_newest_checkpoint_is_taken(tmp_path):
    root = tmp_path / "runs"
    lay_out_run(root, "quick/base", age=0)
    assert newest_checkpoint(root) == PRETRAINED  # a --quick run has learned nothing
    older = lay_out_run(root, "older", age=30)
    assert newest_checkpoint(root) == older
    newer = lay_out_run(root, "newer", age=20, place="checkpoint.old")  # killed between two renames
    assert newest_checkpoint(root) == newer


def test_pretrained_is_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (newest_checkpoint() / "model.safetensors").is_file()
    monkeypatch.setattr(run_module, "PRETRAINED", tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match="there is no trained model: run"):
        newest_checkpoint()


def test_where_a_checkpoint_lies(tmp_path):
    save_checkpoint(tmp_path / "run" / "checkpoint", some_checkpoint())
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint"
    assert find_checkpoint(tmp_path / "run" / "checkpoint") == tmp_path / "run" / "checkpoint"
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / "checkpoint.old")
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint.old"


# --------------------------------------------------------------------------------------------------------
# args.json


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"lr": [1]}, r"lr is \[1\]"),
        ({"batch": {}}, "batch is {}"),
        ({"data": 5}, "data is 5"),
        ({"data": None}, "data is None"),
        ({"captions": "long"}, "captions is 'long'"),
        ({"quick": "yes"}, "quick is 'yes'"),
        ({"compile": 1}, "compile is 1"),
        ({"attention": "fast"}, "attention is 'fast'"),
    ],
)
def test_options_that_were_edited_are_refused(tmp_path, changes, message):
    options = vars(train.parse_arguments(["--quick", "--out", str(tmp_path)]))
    (tmp_path / "args.json").write_text(json.dumps(options))
    argv = ["--resume", "--out", str(tmp_path)]
    assert train.parse_arguments(argv).steps == options["steps"]
    (tmp_path / "args.json").write_text(json.dumps({**options, "minutes": None, "lr": 1} | changes))
    with pytest.raises(ValueError, match=rf"args\.json is not what train\.py has written: {message}"):
        train.parse_arguments(argv)


def test_the_toy_world_needs_a_number_of_clips(tmp_path):
    options = vars(train.parse_arguments(["--quick"]))
    (tmp_path / "args.json").write_text(json.dumps({**options, "clips": None}))
    with pytest.raises(ValueError, match="clips is missing"):
        train.parse_arguments(["--resume", "--out", str(tmp_path)])


def test_options_of_an_older_version_are_taken(tmp_path):
    """It knew fewer of them, and some that are gone."""
    options = vars(train.parse_arguments(["--quick"]))
    options.pop("validation")
    (tmp_path / "args.json").write_text(json.dumps({**options, "gone": [1], "lr": 1}))
    args = train.parse_arguments(["--resume", "--out", str(tmp_path)])
    assert (args.validation, args.lr, args.steps) == (0.1, 1, 20)


# --------------------------------------------------------------------------------------------------------
# A run's directory, without a training


def begin(folder, steps=None, minutes=None, state=BEGIN, resume=False):
    """A run that has begun."""
    run = Run(folder, resume).__enter__()
    run.begin({"steps": steps, "minutes": minutes, "decay": 0.3}, state)
    return run


def do_steps(run, losses):
    """Count a step for each loss."""
    for loss, step in zip(losses, run.steps(), strict=False):
        assert step == run.step
        run.log(torch.tensor(float(loss)), batch=4, lr=0.5)


def test_every_tenth_step_is_written_down(tmp_path):
    run = begin(tmp_path, steps=25)
    do_steps(run, range(25))
    assert numbers(tmp_path) == [
        {"step": 10, "loss": 4.5, "lr": 0.5},
        {"step": 20, "loss": 14.5, "lr": 0.5},
    ]
    assert run.check_losses() == [20, 21, 22, 23, 24]
    run.__exit__()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    """They were written by a run that was killed later, the last of them in the middle of a line."""
    run = begin(tmp_path, steps=50)
    do_steps(run, range(30))
    run.__exit__()
    with run.metrics.open("a") as file:
        file.write('{"step": 20, "lo')
    state = {"step": 25, "seconds": 10.0, "losses": [20.0, 21.0, 22.0, 23.0, 24.0]}
    run = begin(tmp_path, steps=50, state=state, resume=True)
    assert [line["step"] for line in numbers(tmp_path)] == [10, 20]
    assert run.seconds() > 10
    do_steps(run, range(25, 30))
    assert numbers(tmp_path)[-1] == {"step": 30, "loss": 24.5, "lr": 0.5}
    run.__exit__()


def test_the_bar_counts_to_the_end(tmp_path):
    """Without --steps the total is known later. A resumed run begins where it stopped."""
    run = begin(tmp_path, minutes=1)
    for step in run.steps():
        assert run.bar.total == (30 if step > 20 else None)
        run.log(torch.tensor(1.0), 4)
        if step == 20:
            run.total = 30
    assert run.bar.n == 30
    run.__exit__()
    run = begin(tmp_path, steps=40, state={"step": 30, "seconds": 9.0}, resume=True)
    next(run.steps())
    assert (run.bar.n, run.bar.total) == (30, 40)
    run.__exit__()


def test_how_long_a_resumed_run_is(tmp_path):
    """What the minutes came to is kept, until other minutes or steps are wanted. These must not be over."""
    state = {"step": 30, "seconds": 9.0, "total": 60, "minutes": 0.5}
    for steps, minutes, total in ((None, 0.5, 60), (None, 2, math.inf), (50, None, 50)):
        run = begin(tmp_path / f"{steps}-{minutes}", steps, minutes, state)
        assert run.total == total
        run.__exit__()


def test_kept_weights_are_there_before_the_checkpoint(tmp_path, monkeypatch):
    """A run that is killed between the two makes them again. The other way round it would not."""
    written = []
    record = lambda folder, checkpoint: written.append(folder.name)  # noqa: E731
    monkeypatch.setattr(run_module, "save_checkpoint", record)
    (tmp_path / "metrics.jsonl").touch()
    Run(tmp_path).save(some_checkpoint(), keep=True)
    assert written == ["step_000000", "checkpoint"]


@pytest.mark.parametrize("name", ["base", "llm_features", "lr"])
def test_options_are_named_as_they_are_given(name):
    actions = train.make_parser()._actions
    assert [action.dest for action in actions if option_name(name) in action.option_strings] == [name]


def test_minutes_that_are_over(tmp_path):
    """A run that has ended would else train for some steps on its plateau, and end there."""
    state = {"step": 30, "seconds": 60.0, "total": 60, "minutes": 1}
    with pytest.raises(ValueError, match=r"has 1\.0 minutes already: --minutes must be more"):
        begin(tmp_path / "run", minutes=0.9, state=state)
    begin(tmp_path / "other", minutes=1, state=state).__exit__()  # as before


@pytest.mark.parametrize(
    "step, steps, said", [(30, 90, ""), (50, 90, "jumps up"), (60, 60, ""), (60, 90, "jumps up")]
)
def test_a_longer_run_after_its_decay(tmp_path, capsys, step, steps, said):
    """It is told that its learning rate jumps."""
    state = {"step": step, "seconds": 9.0, "total": 60, "minutes": None}
    begin(tmp_path / "run", steps=steps, state=state).__exit__()
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def test_a_loss_that_is_not_finite_is_found(tmp_path):
    run = begin(tmp_path, steps=50)
    do_steps(run, range(12))
    run.losses[1] = torch.tensor(math.nan)
    with pytest.raises(Diverged, match="nan at step 12") as error:
        do_steps(run, range(12, 20))
    assert error.value.step == 11
    run.__exit__()


def test_one_process_trains_in_a_directory(tmp_path):
    lock = filelock.FileLock(tmp_path / "lock")
    with lock, pytest.raises(ValueError, match="another process is training in"), Run(tmp_path):
        pass
    with Run(tmp_path):
        pass
    (tmp_path / "checkpoint.old").mkdir()
    with pytest.raises(ValueError, match=r"holds a run already: give --from .*, and choose"), Run(tmp_path):
        pass  # from grow.py
    (tmp_path / "args.json").touch()
    with pytest.raises(ValueError, match="holds a run already: give --resume, or choose"), Run(tmp_path):
        pass
    with Run(tmp_path, resume=True):
        pass


def test_one_process_that_is_asked_stops_all(tmp_path):
    """`agree` tells this process that another one was asked."""
    asked = iter([False, False, True])
    run = Run(tmp_path, agree=lambda mine: next(asked)).__enter__()
    run.begin({"steps": 9, "minutes": None, "decay": 0.3}, BEGIN)
    do_steps(run, range(9))
    assert run.step == 2 and run.stopped
    assert "stopped and saved at step 2 of 9" in run.summary()
    run.__exit__()


def test_signals_act_as_before_after_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Signals, "stop", Signals.stop.__wrapped__)  # without what conftest.py adds
    before = signal.getsignal(signal.SIGTERM)
    with Run(tmp_path) as run:
        assert signal.getsignal(signal.SIGTERM) == before  # nothing could be saved yet
        run.begin({"steps": 9, "minutes": None, "decay": 0.3}, BEGIN)
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.signals.asked and signal.getsignal(signal.SIGTERM) == before
        assert list(run.steps()) == [] and run.stopped


# --------------------------------------------------------------------------------------------------------
# Trainings that are killed, stopped, interrupted


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder_name):
    """A run of 20 steps that nothing happened to."""
    return run_training(tmp_path_factory.mktemp("runs") / "whole", encoder_name)


@pytest.fixture
def copy_of_whole(tmp_path, whole):
    """The same, for a test to change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_what_a_run_leaves(tmp_path, encoder_name):
    run = train.train(train.parse_arguments(brief(tmp_path / "run", encoder_name)))
    found = sorted(path.name for path in run.iterdir())
    assert found == ["args.json", "checkpoint", "lock", "loss.png", "metrics.jsonl", "samples"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step_000000.gif",
        "step_000010.gif",
        "step_000020.gif",
    ]
    assert [line["step"] for line in numbers(run)] == [0, 10, 10, 20, 20]
    history = load_model(run)[1]["history"]
    assert history == [{"train": "basic", "steps": 20, "captions": "short", "tune": "all", "seed": 0}]


def test_training_is_deterministic(tmp_path, encoder_name, whole):
    assert same_run(whole, run_training(tmp_path / "again", encoder_name))
    other = run_training(tmp_path / "other", encoder_name, "--seed 1")
    assert not same_run(whole, other)


def test_a_run_that_died_in_its_first_step_is_resumed_exactly(tmp_path, encoder_name, whole, monkeypatch):
    """test_all.py has one that dies later."""

    def dies(*_):
        raise MemoryError

    monkeypatch.setattr(train, "update_ema", dies)
    with pytest.raises(MemoryError):
        run_training(tmp_path / "run", encoder_name)
    monkeypatch.undo()
    assert same_run(whole, resume_training(tmp_path / "run"))


def test_a_run_is_not_written_over(whole, encoder_name):
    with pytest.raises(ValueError, match="holds a run already: give --resume"):
        run_training(whole, encoder_name)


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """The other one writes it between the first one's writing and renaming. Nothing else is left."""
    path = tmp_path / "file"

    def meanwhile(file):
        monkeypatch.setattr(run_module, "fsync", lambda file: None)
        write_atomically(path, "theirs")

    monkeypatch.setattr(run_module, "fsync", meanwhile)
    write_atomically(path, "ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_checkpoint_before(copy_of_whole, encoder_name):
    """No file may grow beyond 1,500,000 bytes, as if the disk were full."""
    before = weights_of(copy_of_whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint could not be written: .*File too large"):
            resume_training(copy_of_whole, "--steps 30")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same_tensors(before, weights_of(copy_of_whole))
    assert not (copy_of_whole / "checkpoint.new").exists()
    assert numbers(resume_training(copy_of_whole, "--steps 30"))[-1]["step"] == 30


def test_a_kill_between_two_renames(copy_of_whole, encoder_name):
    """The checkpoint before is found under its other name, and training continues from it."""
    before = numbers(copy_of_whole)
    (copy_of_whole / "checkpoint").rename(copy_of_whole / "checkpoint.old")
    with pytest.raises(ValueError, match="--resume"):
        run_training(copy_of_whole, encoder_name)
    resume_training(copy_of_whole, "--steps 30")
    assert numbers(copy_of_whole)[: len(before)] == before and numbers(copy_of_whole)[-1]["step"] == 30
    assert not (copy_of_whole / "checkpoint.old").exists()


LONGER = "--steps 60 --every 40"


@pytest.fixture(scope="module")
def longer(tmp_path_factory, encoder_name):
    """A run of 60 steps that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "longer"
    run_in_child(brief(run, encoder_name, LONGER))
    return run


def run_in_child(argv):
    """A training in a process of its own, from its beginning to its end."""
    child = train_in_child(argv)
    child.join(300)
    assert child.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves(tmp_path, encoder_name, longer, number):
    run = tmp_path / "run"
    child = train_in_child(brief(run, encoder_name, LONGER))
    wait_for_lines(run, 2, child)
    with pytest.raises(ValueError, match="another process is training in"):
        resume_training(run)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 0
    assert 0 < load_checkpoint(run).trainer_state["step"] < 60
    run_in_child(["--resume", "--out", str(run)])
    assert same_run(run, longer)


def test_ctrl_c_ends_the_compiler_too(tmp_path, encoder_name, longer, monkeypatch):
    """A terminal sends it to the compiler that a step waits for too. The run is saved before that step."""

    def without_compiler(tr, accumulate):
        step = itertools.count()

        def one_step(batch):
            if next(step) == 23:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("C++ compile error")
            return train.training_step(tr, batch)

        return one_step

    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", Signals.stop.__wrapped__)  # this Ctrl-C is not one for the tests
        patch.setattr(train, "make_step", without_compiler)
        run = run_training(tmp_path / "run", encoder_name, LONGER)
    assert load_checkpoint(run).trainer_state["step"] == 23
    assert same_run(resume_training(run), longer)


def test_an_error_of_a_step_is_none_of_the_signals(tmp_path, encoder_name, monkeypatch):
    def one_step(batch):
        raise RuntimeError("out of order")

    monkeypatch.setattr(train, "make_step", lambda tr, accumulate: one_step)
    with pytest.raises(RuntimeError, match="out of order"):
        run_training(tmp_path / "run", encoder_name)


@pytest.mark.slow
def test_twenty_kills(tmp_path, encoder_name):
    """Runs are killed at random places, at first before there is anything to resume. What comes out is what
    would have come out, and no checkpoint is ever unreadable."""
    options = "--clips 32 --steps 100 --every 7"
    run_in_child(brief(tmp_path / "whole", encoder_name, options))
    rng, kills, saved, runs = np.random.default_rng(0), 0, 0, [tmp_path / "run-0"]
    while kills < 20:
        there = can_be_resumed(runs[-1])
        saved += there
        resume = ["--resume", "--out", str(runs[-1])]
        child = train_in_child(resume if there else brief(runs[-1], encoder_name, options))
        if kill_somewhere(child, runs[-1], rng):
            kills += 1
        else:  # it came to its end before: begin another one
            assert child.exitcode == 0
            runs.append(tmp_path / f"run-{len(runs)}")
    if can_be_resumed(runs[-1]):
        run_in_child(["--resume", "--out", str(runs[-1])])
    else:
        run_in_child(brief(runs[-1], encoder_name, options))
    assert saved > 10
    for run in runs:
        assert same_run(run, tmp_path / "whole")


def kill_somewhere(child, run, rng):
    """Kill a training after 0 to 6 more lines of metrics and some time -> whether it was still running."""
    lines = count_lines(run) + rng.integers(7)
    while child.is_alive() and count_lines(run) < lines:
        time.sleep(0.005)
    child.join(rng.uniform(0, 0.5))
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def count_lines(run):
    """The lines of metrics.jsonl so far."""
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def can_be_resumed(run):
    """Whether a killed run has a checkpoint, which then must be whole. If not, --resume must say so."""
    if (run / "checkpoint").exists() or (run / "checkpoint.old").exists():
        load_checkpoint(run)
        return True
    if run.exists():
        with pytest.raises(FileNotFoundError):
            resume_training(run)
    return False


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path, encoder_name, monkeypatch):
    """It names no clips, as that of a training step does: no single step is at fault."""
    losses = iter((0.5, math.nan))
    monkeypatch.setattr(validate, "validation_loss", lambda *_: torch.full((flow.T_BINS,), next(losses)))
    message = "the validation loss is nan after 2 steps: the last checkpoint is kept"
    with pytest.raises(ValueError, match=f"{message}$"):
        run_training(tmp_path / "run", encoder_name, "--steps 4 --every 2")
    assert load_model(tmp_path / "run")[1]["flops"] == 0


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_its_clips(tmp_path, encoder_name, monkeypatch, kind):
    calls = itertools.count()

    def spoiled(model, x, t, noise, prompt):
        loss = flow.flow_loss(model, x, t, noise, prompt)
        if next(calls) != 12:
            return loss
        if kind == "loss":
            return loss * math.nan
        return loss + 0 * (0 * model.final.bias.sum()).sqrt()  # its slope is infinite

    monkeypatch.setattr(train, "flow_loss", spoiled)
    with pytest.raises(ValueError, match="is nan at step 13: the last checkpoint is kept") as error:
        run_training(tmp_path / "run", encoder_name)
    names = ToyDataset("basic", 64).names
    rows = train.random_rows(seed=0, step=12, batch=4, count=64)
    assert str(error.value).endswith(f"({'; '.join(names[row] for row in rows)})")
    assert load_checkpoint(tmp_path / "run").trainer_state["step"] == 10


def write_gifs(root, *names):
    """Clips of 16 x 16 pixels, each of another grey."""
    root.mkdir(exist_ok=True)
    for name in names:
        frames = [Image.new("L", (16, 16), 10 * t + ord(name[0]) % 50) for t in range(8)]
        frames[0].save(root / name, save_all=True, append_images=frames[1:], duration=125)
        (root / name).with_suffix(".txt").write_text("a grey square")


def test_resume_wants_the_same_clips(tmp_path, encoder_name):
    root = tmp_path / "my"
    write_gifs(root, "a.gif", "b.gif")
    run = tmp_path / "run"
    argv = f"--quick --depth 1 --steps 2 --text {encoder_name} --data {root} --out {run}"
    train_without_pictures(argv.split())
    write_gifs(root, "c.gif")
    with pytest.raises(ValueError, match=r"are not those that .* began with; use --from"):
        resume_training(run, "--steps 3")
    (root / "c.gif").unlink()
    assert numbers(resume_training(run, "--steps 3"))[-1]["step"] == 3
    shutil.rmtree(root)  # a header may name any folder: what is forgotten of this one is not watched
    other = f"--quick --from {run} --data basic --clips 16 --steps 2 --out {tmp_path / 'other'}"
    train_without_pictures(other.split())
    assert "old_val_loss" not in numbers(tmp_path / "other")[-1]


def test_resume_skips_what_was_skipped(tmp_path, encoder_name, monkeypatch):
    """A file that the machine was too busy to decode at first, and one that had no caption. A new run takes
    them."""
    root, run = tmp_path / "my", tmp_path / "run"
    names = [f"{letter}.gif" for letter in "abcdefghijkl"]
    write_gifs(root, *names)
    (root / "b.txt").unlink()
    schedule = decode.DecodingPool.schedule

    def busy(pool, path):
        return schedule(pool, path.with_name("nothing.gif") if path.name == "a.gif" else path)

    argv = f"--quick --depth 1 --steps 2 --text {encoder_name} --data {root} --max-bad 0.2".split()
    with monkeypatch.context() as patch:
        patch.setattr(decode.DecodingPool, "schedule", busy)
        train_without_pictures([*argv, "--out", str(run)])
    write_gifs(root, *names)
    assert numbers(resume_training(run, "--steps 3"))[-1]["step"] == 3
    assert load_checkpoint(run).trainer_state["skipped"] == ["b.gif", "a.gif"]
    other = train_without_pictures([*argv, "--out", str(tmp_path / "other")])
    assert load_checkpoint(other).trainer_state["skipped"] == []


def test_all_processes_have_the_same_clips(tmp_path, encoder_name, monkeypatch):
    """Another process has a smaller fingerprint."""
    monkeypatch.setattr(parallel, "agree", lambda number: max(number, -7.0))
    with pytest.raises(ValueError, match="the processes do not find the same clips in basic"):
        run_training(tmp_path / "run", encoder_name)


LONG_TEST = """
from conftest import run_training

def test_long(encoder_name):
    run_training("{run}", encoder_name, "--steps 100000")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_tests(tmp_path, number):
    """Also if it comes in a training, which takes it as a wish to save."""
    run, file = tmp_path / "run", tmp_path / "test_long.py"
    file.write_text(LONG_TEST.format(run=run))
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", f"--rootdir={tmp_path}", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    tests = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        assert tests.poll() is None
        time.sleep(0.1)
    tests.send_signal(number)
    expected = pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -signal.SIGTERM
    assert tests.wait(60) == expected


def test_a_pause_does_not_count_in_the_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(Run, "seconds", lambda run: clock[0])
    run = begin(tmp_path, steps=20)
    for step in run.steps():
        clock[0] += 1
        run.log(torch.tensor(0.0), batch=4)
        if step == 4:
            clock[0] += 100
            run.pause(100)
    run.__exit__()
    assert [record["samples_per_second"] for record in run.records] == [4, 4]
