"""One training step against a step by hand, its random numbers, schedules and options; short trainings.

A step is checked where mistakes hide: the norm of the gradient is above 1, so clipping acts; two steps are
taken, so both betas act; the first steps of the EMA are given as numbers.
"""

import copy
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cost
import data
import machine
import start
import train
import validate
from conftest import (
    SMALL,
    brief,
    checkpoint_of,
    numbers,
    random_inputs,
    random_model,
    randomize,
    resume_training,
    run_training,
    same_run,
    same_tensors,
    tiny_llm,
    train_without_pictures,
    weights_of,
)
from dit import PRESETS, Block, DiT
from grow import grow_state, merge_lora
from machine import GraphedStep, RowStore
from run import PRETRAINED, Run, find_checkpoint, load_checkpoint, load_model, save_checkpoint, save_model
from start import set_up
from text_encoder import Prompts
from train import Batch, learning_rate, parse_arguments, random_batch, training_step
from validate import say_what_to_expect

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def base(tmp_path_factory, encoder_name):
    """A run of 20 steps to continue from."""
    return run_training(tmp_path_factory.mktemp("runs") / "base", encoder_name)


@pytest.fixture(scope="module")
def llm_name(tmp_path_factory):
    """The directory of a tiny random LLM."""
    return tiny_llm(tmp_path_factory.mktemp("llm"))


def set_up_training(encoder_name, options=""):
    """What the loop works on, with a model in which every weight acts."""
    tr = set_up(parse_arguments(brief("unused", encoder_name, options)))
    randomize(tr.model)
    return tr


# --------------------------------------------------------------------------------------------------------
# One step


def loss_by_hand(model, batch, prompt):
    """The mean squared error of the velocity, as flow.py's docstring says it."""
    x, t = batch.x / 127.5 - 1, batch.t.view(-1, 1, 1, 1, 1)
    x_t = t * x + (1 - t) * batch.noise
    velocity = (model(x_t, batch.t, *prompt) - x_t) / (1 - t)
    return (velocity - (x - batch.noise)).square().mean()


def adamw_step_by_hand(weights, gradients, state, lr):
    """One step of Adam with betas 0.9 and 0.95, after clipping to a norm of 1. `state` maps a name to both
    averages and the number of steps. All are changed in place."""
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert norm > 1
    for name, gradient in gradients.items():
        g = gradient / norm
        average, square, steps = state.get(name, (0.0, 0.0, 0))
        average, square, steps = 0.9 * average + 0.1 * g, 0.95 * square + 0.05 * g**2, steps + 1
        state[name] = average, square, steps
        step = (average / (1 - 0.9**steps)) / ((square / (1 - 0.95**steps)).sqrt() + 1e-8)
        weights[name].data.sub_(lr * step)


def test_two_steps_against_steps_by_hand(encoder_name):
    tr = set_up_training(encoder_name, "--clips 16 --precision fp32")
    model, state, lr = copy.deepcopy(tr.model), {}, 2e-3
    tr.lr.fill_(lr)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        batch = random_batch(tr, 0, step, 4)
        loss = loss_by_hand(model, batch, tr.prompts.gather(batch.text_rows))
        weights = dict(model.named_parameters())
        gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
        adamw_step_by_hand(weights, gradients, state, lr)
        torch.testing.assert_close(training_step(tr, batch), loss.detach())
    moved = 0
    for name, p in tr.model.named_parameters():
        mine, (average, square, steps) = tr.optimizer.state[p], state[name]
        assert mine["step"] == steps == 2
        assert relative_error(mine["exp_avg"], average) < 1e-3, name
        assert relative_error(mine["exp_avg_sq"], square) < 1e-3, name
        moved += (p - start[name]).abs().mean().item()
        assert (p - weights[name]).abs().mean() < 0.01 * lr, name
    assert moved > 0.1 * lr * len(start)


def relative_error(a, b):
    """Of whole tensors: the norm of the difference over that of `b`."""
    return ((a - b).norm() / b.norm()).item()


def test_a_gradient_that_is_not_finite_is_a_loss_that_is_not(encoder_name):
    tr = set_up_training(encoder_name, "--clips 16")
    tr.model.final.bias.register_hook(lambda gradient: gradient * math.inf)
    assert training_step(tr, random_batch(tr, 0, 0, 4)).isnan()


@pytest.mark.parametrize("parts, again", [(2, False), (3, True)])
def test_a_step_in_parts(encoder_name, parts, again):
    """Gradients summed over parts of different sizes, with blocks computed twice, are those of the batch."""
    whole, in_parts = (set_up_training(encoder_name, "--clips 16 --precision fp32") for _ in range(2))
    in_parts.model.checkpoint_activations = again
    calls = []
    in_parts.model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    batch = random_batch(whole, 0, 0, 5)
    losses = training_step(whole, batch), training_step(in_parts, batch, parts)
    torch.testing.assert_close(*losses)
    assert len(calls) == parts * (2 if again else 1)
    for a, b in zip(whole.model.parameters(), in_parts.model.parameters(), strict=True):
        mine, other = whole.optimizer.state[a]["exp_avg"], in_parts.optimizer.state[b]["exp_avg"]
        assert relative_error(other, mine) < 1e-4


def test_a_step_in_two_parts_calls_the_model_twice(encoder_name):
    tr, calls = set_up_training(encoder_name, "--clips 16"), []
    tr.model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    train.make_step(tr, 2)(train.random_batch(tr, 0, 0, 4))
    assert len(calls) == 2


def test_flops_of_a_step(encoder_name):
    tr = set_up_training(encoder_name)
    assert tr.flops == 4 * cost.count_flops(tr.model, tr.prompts.lengths)


def test_every_line_of_the_log_has_its_flops(tmp_path, encoder_name):
    run = run_training(tmp_path / "run", encoder_name, "--steps 10")
    assert len({(line["step"], line["flops"]) for line in numbers(run)}) == 2


def test_half_precision_on_the_cpu(encoder_name):
    """The scaled loss of float16 trains: the loss on one batch falls, and the scale survives."""
    tr = set_up_training(encoder_name, "--clips 16 --precision fp16")
    assert tr.scaler.is_enabled()
    tr.lr.fill_(1e-3)
    batch = random_batch(tr, 0, 0, 4)
    losses = [training_step(tr, batch).item() for _ in range(6)]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]
    assert tr.scaler.get_scale() > 1


def test_gradients_are_clipped_after_their_scale_is_taken_out(encoder_name):
    half, full = (set_up_training(encoder_name, f"--clips 16 --precision {p}") for p in ("fp16", "fp32"))
    batch = train.random_batch(full, 0, 0, 4)
    train.training_step(full, batch)
    for _ in range(20):  # steps that overflow are skipped
        if not half.optimizer.state:
            train.training_step(half, batch)
    for a, b in zip(half.model.parameters(), full.model.parameters(), strict=True):
        assert relative_error(half.optimizer.state[a]["exp_avg"], full.optimizer.state[b]["exp_avg"]) < 0.2


def test_a_resumed_run_in_half_precision_keeps_its_scale(tmp_path, encoder_name):
    run = run_training(tmp_path / "run", encoder_name, "--precision fp16 --steps 2")
    file = run / "checkpoint" / "train_state.json"
    state = json.loads(file.read_text())
    assert state["scaler"]["scale"] > 128
    state["scaler"]["scale"] = 128.0
    file.write_text(json.dumps(state))
    tr = set_up(parse_arguments(["--resume", "--out", str(run), "--steps", "4"]))
    assert tr.scaler.get_scale() == 128


def test_ema_of_the_first_steps_and_of_later_ones():
    """The decay is 1/10, 2/11, 3/12, ... (TensorFlow's rule), and at most the one that is given."""
    for step, decay in ((0, 1 / 10), (1, 2 / 11), (9, 10 / 19), (80, 0.9), (10**6, 0.9)):
        model, ema = random_model(), random_model(seed=1)
        before = copy.deepcopy(ema)
        train.update_ema(ema, model, step, decay=0.9)
        for p, q, old in zip(ema.parameters(), model.parameters(), before.parameters(), strict=True):
            assert torch.allclose(p, decay * old + (1 - decay) * q, atol=1e-6), step


def test_an_ema_without_decay_is_the_weights(tmp_path, encoder_name):
    tensors = weights_of(run_training(tmp_path / "run", encoder_name, "--ema 0 --steps 2"))
    for name in [n for n in tensors if n.startswith("ema.")]:
        assert torch.equal(tensors[name], tensors["weights" + name[3:]])


def test_learning_rate():
    rates = [learning_rate(2.0, step, 1000, warmup=100) for step in range(1001)]
    assert rates[0] == 0.02 and rates[49] == 1.0 and rates[99] == rates[400] == rates[700] == 2.0
    assert rates[850] == pytest.approx(1.0) and rates[1000] == 0
    assert learning_rate(2.0, 49, 1000, 100, start=1.0) == 1.5  # from where the base stopped
    assert learning_rate(2.0, 0, 1000, 100, start=9.0) == 2.0  # a lower rate is obeyed at once
    assert learning_rate(2.0, 999, 1000, 100, decay=0) == 2.0
    assert learning_rate(2.0, 999, math.inf, 100) == 2.0
    assert learning_rate(2.0, 75, 100, 10, decay=0.5) == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------------
# What is random in a step


def numbered_clips(count=50, text_dropout=0.0):
    """What `random_batch` asks for: clip i is full of i, and its caption is row 100 + i; row 7 is the null
    prompt."""
    clips = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    device = torch.device("cpu")
    return SimpleNamespace(
        clips=RowStore(clips, device),
        captions=100 + torch.arange(count),
        prompts=SimpleNamespace(null=7),
        device=device,
        text_dropout=text_dropout,
    )


def test_a_batch_is_a_function_of_seed_and_step():
    tr = numbered_clips()
    first = random_batch(tr, 3, 5, 64)
    torch.rand(10)  # the global generator has no part in it
    assert all(map(torch.equal, first, random_batch(tr, 3, 5, 64)))
    for seed, step in ((3, 6), (4, 5), (4, 4)):
        for mine, other in zip(first, random_batch(tr, seed, step, 64), strict=True):
            assert not torch.equal(mine, other)


def test_the_seed_of_a_run_is_that_of_its_batches(tmp_path, encoder_name, monkeypatch):
    seeds = []
    real = train.random_batch
    monkeypatch.setattr(
        train, "random_batch", lambda tr, seed, *rest: seeds.append(seed) or real(tr, seed, *rest)
    )
    run_training(tmp_path / "run", encoder_name, "--seed 7 --steps 1")
    assert seeds == [7]


def test_what_a_batch_holds():
    batch = random_batch(numbered_clips(), 0, 7, 4000)
    assert batch.x.unique().tolist() == list(range(50))
    logit = torch.logit(batch.t)
    assert logit.mean() == pytest.approx(-1, abs=0.05) and logit.std() == pytest.approx(0.65, abs=0.05)
    assert batch.noise.mean() == pytest.approx(0, abs=0.05)
    assert batch.noise.std() == pytest.approx(1, abs=0.05)
    null = batch.text_rows == 7
    assert torch.equal(batch.text_rows, batch.llm_rows)
    assert torch.equal(batch.text_rows[~null], 100 + batch.x.flatten()[~null])  # each clip has its caption
    assert null.float().mean() == pytest.approx(0.1, abs=0.02)


def test_both_parts_have_captions_as_asked_for():
    args = train.parse_arguments(
        ["--data", "rich", "--clips", "16", "--captions", "both", "--words", "varied"]
    )
    found = start.open_data(args, replace(SMALL, frames=4, size=16), 8, [], torch.device("cpu"))
    for dataset, seed in ((found.clips, 0), (found.held_out["val_loss"], 1)):
        assert dataset.captions == data.captions_of(data.make_scenes("rich", 16, seed), "both", "varied", 0.1)


def test_captions_are_dropped_for_both_encoders_or_for_the_small_one():
    batch = random_batch(numbered_clips(text_dropout=0.4), 0, 7, 4000)
    no_text, no_llm = batch.text_rows == 7, batch.llm_rows == 7
    assert no_llm.float().mean() == pytest.approx(0.1, abs=0.02)
    assert (no_text & ~no_llm).float().mean() == pytest.approx(0.4, abs=0.03)
    assert not (no_llm & ~no_text).any()
    assert torch.equal(batch.text_rows[~no_text], batch.llm_rows[~no_text])


def test_a_batch_is_cut_into_parts():
    batch = random_batch(numbered_clips(), 0, 0, 7)
    parts = batch.split(3)
    assert [len(part.t) for part in parts] == [3, 3, 1]
    assert all(map(torch.equal, batch, map(torch.cat, zip(*parts, strict=True))))


def test_prompts_are_padded_to_few_lengths(encoder_name):
    """To a multiple of a quarter of the longest, but never beyond it."""
    tr = set_up_training(encoder_name, "--clips 64")
    (features,) = tr.prompts.features
    features.lengths, features.max_length = torch.tensor([1, 3, 4, 7, 9, 10]), 10
    none = torch.empty(0)
    for rows, length in (([0], 3), ([0, 1], 3), ([2], 6), ([3, 0], 9), ([4, 1], 9), ([5], 10)):
        batch = Batch(none, none, none, torch.tensor(rows), torch.tensor(rows))
        assert train.prompt_lengths(tr, batch) == [length]
    elsewhere = replace(tr, device=torch.device("meta"))  # where the CPU would have to wait
    assert train.prompt_lengths(elsewhere, batch) == [10]


# --------------------------------------------------------------------------------------------------------
# Where the clips lie, and recorded steps (machine.py)


class NotingStore(RowStore):
    """A store that notes which rows were read."""

    def pinned(self, index):
        self.read = [*getattr(self, "read", []), index.tolist()]
        return super().pinned(index)


TENSOR = torch.arange(16, dtype=torch.uint8).view(4, 2, 2)  # of four rows, as clips are


def test_rows_on_the_cpu():
    store = RowStore(TENSOR, torch.device("cpu"))
    index = torch.tensor([2, 0, 0])
    assert store.tensor is TENSOR and torch.equal(store.take(index, index), TENSOR[index])


def test_rows_that_fit_are_moved_to_the_device():
    store = RowStore(TENSOR, torch.device("meta"))
    assert store.pool is None and store.tensor.device.type == "meta" and len(store.tensor) == 4
    assert store.take(torch.tensor([1, 3]), torch.tensor([0])).shape == (2, 2, 2)


def test_rows_that_do_not_fit_are_read_ahead(monkeypatch):
    monkeypatch.setattr(machine, "fits", lambda size, device: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which needs a GPU
    store = NotingStore(TENSOR, torch.device("meta"))
    store.device = torch.device("cpu")
    batches = [torch.tensor(index) for index in ([0, 1], [2, 2], [3, 0], [1, 1])]
    assert torch.equal(store.take(batches[0], batches[1]), TENSOR[batches[0]])
    assert torch.equal(store.take(batches[1], batches[2]), TENSOR[batches[1]])
    assert torch.equal(store.take(batches[3], batches[0]), TENSOR[batches[3]])  # another one than foretold
    store.pool.shutdown()
    assert sorted(store.read) == [[0, 1], [0, 1], [1, 1], [2, 2], [3, 0]]  # [2, 2] was read once, ahead


@needs_gpu
def test_rows_come_to_the_gpu(monkeypatch):
    for fits in (True, False):
        monkeypatch.setattr(machine, "fits", lambda size, device, fits=fits: fits)
        store = RowStore(TENSOR, torch.device("cuda"))
        for index in (torch.tensor([0, 3]), torch.tensor([2, 1])):
            batch = store.take(index, torch.tensor([2, 1]))
            assert batch.is_cuda and torch.equal(batch.cpu(), TENSOR[index])


@needs_gpu
def test_a_recorded_step_is_the_step(tmp_path, encoder_name, monkeypatch):
    """Also after a resume, which counts the calls before the recording from zero again."""
    recorded = run_training(tmp_path / "recorded", encoder_name, "--warmup 5")
    halves = run_training(tmp_path / "halves", encoder_name, "--warmup 5 --decay 0 --steps 10")
    resume_training(halves, "--steps 20")
    in_one = run_training(tmp_path / "in-one", encoder_name, "--warmup 5 --decay 0")
    monkeypatch.setattr(train, "GraphedStep", lambda function: function)
    eager = run_training(tmp_path / "eager", encoder_name, "--warmup 5")
    assert same_run(recorded, eager) and same_run(halves, in_one)


@needs_gpu
def test_a_recorded_function_is_replayed():
    calls, state = [], torch.zeros(3, device="cuda")

    def function(x):
        calls.append(1)
        state.add_(x)
        return state.sum()

    step = GraphedStep(function)
    for i in range(1, 11):
        assert step(torch.full((3,), float(i), device="cuda")).item() == 3 * sum(range(i + 1))
    assert len(calls) == machine.WARMUP_CALLS + 1


# --------------------------------------------------------------------------------------------------------
# What a GPU decides: precision and batch


@pytest.mark.parametrize(
    "device, fast, precision",
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", 1, None)],
)
def test_precision_of_devices_that_are_not_here(monkeypatch, device, fast, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # what a CPU has does not count
    assert machine.pick_precision("auto", torch.device(device)) == precision


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_a_device_that_is_not_here_is_refused():
    """In one short line, though torch says more."""
    with pytest.raises(ValueError, match="there is no device 'mps' here") as error:
        machine.pick_device("mps")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 and "--device cpu" in str(error.value)


CPU = torch.device("cpu")


def fake_card(gib, preset, monkeypatch):
    """A GPU of so many GiB -> a model of a preset, and the bytes of the default clips if they fit."""
    monkeypatch.setattr(start, "card", lambda device: ("NVIDIA X", gib * 2**30))
    monkeypatch.setattr(machine, "card", start.card)
    config = PRESETS[preset]
    with torch.device("meta"):
        model = DiT(config)
    size = 16384 * 3 * config.frames * config.size**2
    return model, size if machine.fits(size, CPU) else 0


def batch_for(gib, preset, monkeypatch, **options):
    """What `pick_batch` gives a card of so many GiB."""
    model, resident = fake_card(gib, preset, monkeypatch)
    clips = SimpleNamespace(device=CPU, nbytes=lambda: resident)
    model.checkpoint_activations = options.pop("again", False)
    args = {"preset": preset, "base": None, "steps": 6000, "shard": False, "accumulate": 1, **options}
    prompts = SimpleNamespace(features=[], lengths=[32])
    return start.pick_batch(SimpleNamespace(**args), model, clips, prompts, torch.bfloat16)


@pytest.mark.parametrize(
    "preset, batches", [("tiny", [32, 32, 32, 32]), ("small", [8, 8, 16, 32]), ("base", [1, 4, 8, 16])]
)
def test_a_batch_suits_the_card(preset, batches, monkeypatch):
    """As docs/gpu.md tells."""
    table = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    for gib, batch in zip((8, 16, 24, 80), batches, strict=True):
        assert batch_for(gib, preset, monkeypatch) == batch
        model, resident = fake_card(gib, preset, monkeypatch)
        needed = cost.memory_needed(model, batch, [32], torch.bfloat16, resident) / 2**30
        lie_there = "yes" if resident else "no"
        assert f"| {gib} GiB | `{preset}` | {batch} | {needed:.1f} GiB | {lie_there} |" in table


def test_unequal_cards_take_the_batch_of_the_smallest(monkeypatch):
    monkeypatch.setattr(start.parallel, "agree", lambda number: max(number, -4))  # another one took 4
    assert batch_for(80, "small", monkeypatch) == 4 and batch_for(8, "base", monkeypatch) == 1


def test_a_card_says_what_it_has_chosen(monkeypatch, capsys):
    assert batch_for(24, "small", monkeypatch) == 16
    line = "NVIDIA X with 24 GiB: preset small, batch 16, 6000 steps; --preset, --batch and --steps change it"
    assert capsys.readouterr().out == f"{line}\n"
    assert batch_for(24, "small", monkeypatch, accumulate=2, steps=None, minutes=1.5) == 32  # 16 at a time
    assert "batch 32, 1.5 minutes" in capsys.readouterr().out
    assert batch_for(8, "base", monkeypatch, again=True) == 8
    with pytest.raises(ValueError, match=r"preset base needs about 6\.\d GiB; give --checkpoint-activations"):
        batch_for(7, "base", monkeypatch)


def test_processes_take_the_same_number_of_clips(monkeypatch):
    monkeypatch.setattr(start.parallel, "agree", lambda number: number)  # their cards are equal
    for world, batch, of_24 in ((2, 32, 32), (3, 30, 30), (5, 30, 30)):
        monkeypatch.setattr(start.parallel, "WORLD", world)
        assert batch_for(80, "small", monkeypatch) == batch
        assert batch_for(24, "small", monkeypatch) == of_24
    clips = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.undo()
    assert start.pick_batch(None, DiT(SMALL), clips, None, None) == 32


def test_a_resumed_run_keeps_the_batch_that_another_card_chose(tmp_path, encoder_name, monkeypatch):
    """A card of 16 MiB takes fewer than 32 clips. The numbers are those in args.json."""
    run = tmp_path / "run"
    monkeypatch.setattr(start, "card", lambda device: ("NVIDIA X", 16 * 2**20))
    line = f"--preset nano --depth 1 --frames 4 --size 16 --clips 64 --text {encoder_name} --out {run}"
    train_without_pictures(f"{line} --steps 2 --no-compile --validation 0.1".split())
    chosen = json.loads((run / "args.json").read_text())["batch"]
    assert chosen in (2, 4, 8, 16)
    monkeypatch.setattr(start, "card", lambda device: ("NVIDIA Y", 80 * 2**30))
    resume_training(run, "--steps 4")
    assert json.loads((run / "args.json").read_text())["batch"] == chosen


# --------------------------------------------------------------------------------------------------------
# How long a run lasts


@pytest.fixture
def half_seconds(monkeypatch):
    """A clock by which a step takes half a second, and nothing else any time. Ten steps are timed."""
    monkeypatch.setattr(train, "TIMED_STEPS", 10)
    monkeypatch.setattr(Run, "seconds", lambda run: 0.5 * run.step)


def test_minutes_become_steps(tmp_path, encoder_name, half_seconds):
    """18 seconds are 36 steps. Up to step 10 nobody knows how many; then the rate comes down in time."""
    run = run_training(tmp_path / "run", encoder_name, "--minutes 0.3 --every 100 --warmup 1")
    state = load_checkpoint(run).trainer_state
    assert (state["step"], state["total"]) == (36, 36)
    rates = {line["step"]: line["lr"] for line in numbers(run) if "lr" in line}
    assert rates[10] == rates[20] == max(rates.values())
    assert rates[30] == pytest.approx(rates[10] * (7 / 36) / 0.3)
    assert state["lr"] == pytest.approx(rates[10] * (1 / 36) / 0.3)


def test_minutes_count_validations_and_what_was_done():
    run = SimpleNamespace(step=40, pause_seconds=6.0, records=[{"samples_per_second": 8.0}])
    run.seconds = lambda: 30.0
    args = SimpleNamespace(batch=4, every=12, minutes=1.0)
    assert train.steps_within(args, run) == 40 + 24  # (60 - 30 - 6) / (4 / 8 + 6 / 12)
    args.minutes = 0.1
    assert train.steps_within(args, run) == 40


@pytest.mark.parametrize(
    "begun, more, total",
    [
        ("--minutes 0.2", "--steps 27", 27),
        ("--minutes 0.2", "--minutes 0.4", 48),
        ("--minutes 0.2", "", 24),
        ("--steps 24", "--minutes 0.4", 48),
        ("--steps 24", "--steps 27", 27),
    ],
)
def test_a_resumed_run_is_as_long_as_is_said_last(tmp_path, encoder_name, half_seconds, begun, more, total):
    run = run_training(tmp_path / "run", encoder_name, f"{begun} --every 100")
    assert load_checkpoint(run).trainer_state["step"] == 24
    resume_training(run, more)
    assert load_checkpoint(run).trainer_state["step"] == total
    options = parse_arguments(["--resume", "--out", str(run)])
    in_minutes = "minutes" in (more or begun)
    assert (options.steps is None, options.minutes is None) == (in_minutes, not in_minutes)


def test_a_slower_machine_does_not_change_what_minutes_came_to(
    tmp_path, encoder_name, half_seconds, monkeypatch
):
    """A run that is stopped when its length was known ends at the same step, bit for bit the same."""
    whole = run_training(tmp_path / "whole", encoder_name, "--minutes 0.2 --every 100")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_ask_at_15)
        run = run_training(tmp_path / "run", encoder_name, "--minutes 0.2 --every 100")
    assert load_checkpoint(run).trainer_state["step"] == 15
    monkeypatch.setattr(Run, "seconds", lambda run: 5.0 * run.step)
    resume_training(run)
    assert same_tensors(weights_of(run), weights_of(whole))


def test_the_first_steps_of_a_process_are_not_timed(tmp_path, encoder_name, half_seconds, monkeypatch):
    """A resumed run compiles again, here for 30 s. In the 72 s there is time for 42 s of steps."""
    run = run_training(tmp_path / "run", encoder_name, "--steps 8 --every 100")
    monkeypatch.setattr(Run, "seconds", lambda run: 0.5 * run.step + 30 * (run.step > 8))
    resume_training(run, "--minutes 1.2")
    assert load_checkpoint(run).trainer_state["step"] == 84


def test_what_is_stopped_is_no_validation(tmp_path, encoder_name, monkeypatch, capsys):
    """--keep keeps the weights of validations alone. How long the run would have been is not known yet."""
    monkeypatch.setattr(Run, "log", log_and_ask_at_15)
    run = run_training(tmp_path / "run", encoder_name, "--minutes 9 --every 10 --keep")
    assert sorted(folder.name for folder in run.glob("step_*")) == ["step_000000", "step_000010"]
    assert "stopped and saved at step 15; continue" in capsys.readouterr().out


def test_a_run_without_a_training_state_is_not_resumed(tmp_path, encoder_name):
    run = run_training(tmp_path / "run", encoder_name, "--steps 2")
    for file in (run / "checkpoint").glob("train_state*"):
        file.unlink()
    with pytest.raises(ValueError, match="no training state to resume: continue with --from"):
        resume_training(run, "--steps 4")


def test_samples_are_drawn_by_the_ema(tmp_path, encoder_name, monkeypatch):
    drawn = []
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    monkeypatch.setattr(
        validate, "draw_samples", lambda tr, model, path: drawn.append((model is tr.ema, path.name))
    )
    train.train(train.parse_arguments(brief(tmp_path / "run", encoder_name, "--steps 1")))
    assert drawn == [(True, "step_000000.gif"), (True, "step_000001.gif")]


def test_losses_are_plotted_over_rising_timesteps(tmp_path, encoder_name, monkeypatch):
    times = []
    monkeypatch.setattr(validate, "draw_samples", lambda *_: None)
    monkeypatch.setattr(Run, "plot", lambda run, t: times.append(t))
    train.train(train.parse_arguments(brief(tmp_path / "run", encoder_name, "--steps 1")))
    assert (times[-1].diff() > 0).all()


def log_and_ask_at_15(run, *arguments, log=Run.log, **numbers):
    """`Run.log`, and a wish to stop after step 15."""
    log(run, *arguments, **numbers)
    run.signals.asked = run.step == 15


# --------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "line, message",
    [
        ("--preset huge", "invalid choice: 'huge'"),
        ("--steps many", "invalid int value: 'many'"),
        ("--steps 0", "--steps is 0; it must be a finite number above zero"),
        ("--minutes inf", "--minutes is inf"),
        ("--lr inf", "--lr is inf"),
        ("--lr nan", "--lr is nan"),
        ("--minutes -1", "--minutes is -1.0"),
        ("--decay 2", "--decay is 2.0; it must be from 0 to 1"),
        ("--ema 1", "--ema is 1.0"),
        ("--max-bad -1", "--max-bad is -1.0"),
        ("--grow llm --drop-text 1 --from base", "--drop-text is 1.0"),
        ("--grow height --from base", "no growth is called 'height'"),
        ("--from base --where prefix", "--where is for --grow depth"),
        ("--grow width --add 2 --from base", "--add is for --grow depth"),
        ("--grow depth --llm-features mean --from base", "--llm-features is for --grow llm"),
        ("--from base --depth 3", "--depth is for a new model"),
        ("--tune lora", "--tune lora needs a base"),
        ("--steps 5 --minutes 1", "both say how long to train"),
        ("--data nowhere", "neither a set of the toy world"),
        ("--fps 24", "--fps is for a folder"),
        ("--data {folder} --words varied", "--words is for the toy world"),
        ("--data {folder} --fps 0.001", "--fps is 0.001"),
        ("--accumulate 33", "more than the clips of a step, 32"),
        ("--shard", "--shard is for several processes"),
        ("--resume --out {folder}", "there is no run to resume"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, line, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        parse_arguments(line.format(folder=tmp_path).split())
    assert "\n" not in str(error.value)


def test_defaults_are_filled_in():
    args = parse_arguments([])
    assert (args.preset, args.data, args.captions, args.clips) == ("tiny", "basic", "short", 16384)
    assert (args.steps, args.batch, args.every, args.out) == (6000, None, 1500, "runs/base")
    args = parse_arguments(["--from", "runs/a", "--data", "both"])
    assert (args.captions, args.clips, args.steps, args.out) == ("both", 4096, 1200, "runs/a-more")
    args = parse_arguments(["--quick", "--batch", "5"])
    assert (args.preset, args.batch, args.steps, args.clips, args.compile) == ("nano", 5, 20, 256, False)
    assert parse_arguments(["--quick", "--minutes", "1"]).steps is None
    args = parse_arguments(["--quick", "--preset", "tiny", "--every", "1500"])  # as without --quick
    assert (args.preset, args.every) == ("tiny", 1500)


NO_HEADERS = torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no Python.h"), None)
NO_CACHE = PermissionError("where TORCHINDUCTOR_CACHE_DIR points")


@pytest.mark.parametrize(
    ("system", "error"), [("linux", None), ("linux", NO_HEADERS), ("linux", NO_CACHE), ("darwin", None)]
)
def test_steps_are_compiled_where_torch_can(system, error, encoder_name, monkeypatch, capsys):
    """Elsewhere they run as they are, and it is said: without Python's headers, for example, g++ fails."""

    def stand_in(function):
        if error:
            raise error
        return function

    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(torch, "compile", stand_in)
    machine.compiles.cache_clear()
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block))
    tr = set_up_training(encoder_name, "--compile")
    machine.compiles.cache_clear()
    works = system == "linux" and not error
    assert compiled == (list(tr.model.blocks) if works else [])
    assert ("python3-dev" in capsys.readouterr().out) != works


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "false"])
def test_compilation_is_tried(compiler, tmp_path):
    """With a C++ compiler that fails, as one does that is too old, torch.compile does not work."""
    if compiler == "g++" and not shutil.which("g++"):
        pytest.skip("there is no g++ here")
    code = "import machine, torch; print(machine.compiles(torch.device('cpu')))"
    env = {**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(machine.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == f"{compiler == 'g++'}\n", done.stderr


def test_options_reach_the_model(encoder_name):
    tr = set_up_training(encoder_name, "--attention eager --checkpoint-activations")
    assert tr.model.checkpoint_activations and tr.model.blocks[0].attn.backend == "eager"


def test_wide_models_learn_at_a_lower_rate(encoder_name, monkeypatch):
    """The rate falls with the square root of the width, unless --lr says otherwise."""
    monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], width=512))
    assert set_up_training(encoder_name).peak == pytest.approx(start.BASE_LR / 2)
    assert set_up_training(encoder_name, "--lr 1e-3").peak == pytest.approx(1e-3)


def test_the_help_tells_the_defaults():
    for action in train.make_parser()._actions:
        if action.default not in (None, False) and action.option_strings[0] != "-h":
            told = re.findall(r"\(([^()]*)\)", action.help)[-1]
            value = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
            numbers_told = [f"{float(n):g}" for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", told)]
            assert value in told or value in numbers_told, action.option_strings


@pytest.mark.parametrize(
    "line, out",
    [
        ("--from runs/a --grow depth,llm", "runs/a-depth-llm"),
        ("--from runs/a/checkpoint --tune lora", "runs/a-lora"),
        ("--from checkpoint", "runs/{here}-more"),
        ("--from .", "runs/{here}-more"),
    ],
)
def test_a_run_is_named_after_its_base(tmp_path, monkeypatch, line, out):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(line.split()).out == out.format(here=tmp_path.name)


def test_a_start_knows_the_rate_of_its_base(encoder_name, base):
    """So a checkpoint that is saved before the first step says it, and a plateau goes on from there."""
    tr = set_up(parse_arguments(brief("unused", encoder_name, f"--from {base}")))
    assert tr.lr.item() == pytest.approx(load_checkpoint(base).trainer_state["lr"]) and tr.lr > 0


def test_the_toy_world_has_its_own_frame_rate(tmp_path, encoder_name, base):
    """Not that of the clips that the base learned."""
    checkpoint = load_checkpoint(base)
    metadata = checkpoint.metadata | {"fps": 24}
    save_checkpoint(tmp_path / "checkpoint", checkpoint._replace(metadata=metadata))
    tr = set_up(parse_arguments(brief("unused", encoder_name, f"--from {tmp_path}")))
    assert tr.metadata["fps"] == 8


def test_a_new_model_takes_any_number_as_its_seed(encoder_name):
    set_up_training(encoder_name, f"--seed {10**30}")


def test_growth_needs_no_run(tmp_path, monkeypatch):
    """Without a run called base, the included model is grown."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)  # of a run that was killed at once
    args = parse_arguments(["--grow", "depth"])
    assert find_checkpoint(args.base) == PRETRAINED and args.out == "runs/pretrained-depth"
    save_checkpoint(tmp_path / "runs" / "base" / "checkpoint.old", load_checkpoint(PRETRAINED))
    args = parse_arguments(["--grow", "depth"])
    assert (args.base, args.out) == ("runs/base", "runs/base-depth")


def test_quick_runs_are_out_of_the_way(tmp_path, monkeypatch):
    """A self-test takes no name of a real run, and real runs do not grow what has learned nothing."""
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--quick"]).out == "runs/quick/base"
    args = parse_arguments(["--quick", "--grow", "depth"])
    assert find_checkpoint(args.base) == PRETRAINED and args.out == "runs/quick/pretrained-depth"
    save_checkpoint(tmp_path / "runs" / "quick" / "base" / "checkpoint", load_checkpoint(PRETRAINED))
    args = parse_arguments(["--quick", "--grow", "depth"])
    assert (args.base, args.out) == ("runs/quick/base", "runs/quick/base-depth")
    assert find_checkpoint(parse_arguments(["--grow", "depth"]).base) == PRETRAINED


@pytest.fixture
def options_of(tmp_path):
    """A function that writes the args.json of a run, and parses a line that resumes it."""

    def parse(line, **changes):
        args = vars(parse_arguments(["--out", str(tmp_path)]))
        (tmp_path / "args.json").write_text(json.dumps({**args, **changes}))
        return parse_arguments(["--resume", "--out", str(tmp_path), *line.split()])

    return parse


def test_a_resumed_run_keeps_its_options(options_of):
    args = options_of("--every 7 --device cpu --accumulate 2", llm_features="mean", seed=5, shard=True)
    assert (args.seed, args.every, args.accumulate, args.llm_features) == (5, 7, 2, "mean")
    assert not args.shard  # it may have fewer processes now
    for line, message in (
        ("--batch 8", "leave out --batch"),
        ("--grow depth", "leave out --grow"),
        ("--from runs/a", "leave out --from"),
        ("--steps 0", "--steps is 0"),
        ("--steps 7 --minutes 1", "leave out one"),
    ):
        with pytest.raises(ValueError, match=message):
            options_of(line)


def test_options_of_another_version_are_resumed(options_of, tmp_path):
    """Options may have gone, or come with a default."""
    args = options_of("", refiner=0, flops=None)
    assert args.seed == 0
    for content, message in (("{}", "data is None"), ("[1]", "is no JSON object")):
        (tmp_path / "args.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            parse_arguments(["--resume", "--out", str(tmp_path)])


# --------------------------------------------------------------------------------------------------------
# Learning


# --------------------------------------------------------------------------------------------------------
# Continuing from a run


def test_continuing_from_a_plateau_is_going_on(tmp_path, encoder_name):
    """40 steps are 20 steps and 20 more, bit for bit: weights, EMA, optimizer state, draws, learning rate."""
    options = "--data basic --captions short --decay 0 --warmup 5 --every 20"
    whole = run_training(tmp_path / "whole", encoder_name, f"{options} --lr 1e-3 --steps 40")
    first = run_training(tmp_path / "first", encoder_name, f"{options} --lr 1e-3 --steps 20")
    rest = run_training(tmp_path / "rest", encoder_name, f"{options} --steps 20 --from {first}")
    assert same_tensors(weights_of(whole), weights_of(rest))
    metadata = load_model(rest)[1]
    assert metadata["flops"] == load_model(whole)[1]["flops"] > 0
    assert [event["steps"] for event in metadata["history"]] == [20, 20]


@pytest.mark.parametrize(
    "tune, options, operator, how",
    [
        ("new", "--grow depth --add 2", "depth", {"add": 2}),
        ("lora", "--rank 2", "lora", {"rank": 2}),
    ],
)
def test_what_is_tuned(tmp_path, encoder_name, base, tune, options, operator, how):
    """Only what is new moves, in a run and in one that was stopped; both come to the same."""
    options = f"--from {base} --tune {tune} {options} --decay 0 --every 20"
    run = run_training(tmp_path / "run", encoder_name, options)
    stopped = run_training(tmp_path / "stopped", encoder_name, f"{options} --steps 10")
    resume_training(stopped, "--steps 20")
    assert same_tensors(weights_of(run), weights_of(stopped))
    start, end = grow_state(load_checkpoint(base), operator, **how), load_checkpoint(stopped)
    new = set(start.metadata["new"])
    assert set(end.metadata["new"]) == end.optimizer_state.keys() == new
    assert end.metadata["history"][-1]["tune"] == tune
    moved = set()
    for name, averaged in start.ema.named_parameters():
        if name not in new:  # frozen weights are set to their EMA values
            assert torch.equal(end.model.get_parameter(name), averaged)
        if not torch.equal(end.ema.get_parameter(name), averaged):
            moved.add(name)
    assert moved and moved <= new


def test_adapters_are_merged_after_training(tmp_path, encoder_name, base):
    run = run_training(tmp_path / "run", encoder_name, f"--from {base} --tune lora --rank 2 --steps 5")
    run_training(tmp_path / "more", encoder_name, f"--from {run} --tune lora --rank 2 --steps 1")
    with pytest.raises(ValueError, match="has adapters of rank 2: leave out --rank"):
        run_training(tmp_path / "other", encoder_name, f"--from {run} --tune lora --rank 8")
    adapted, inputs = load_model(run)[0], None
    merged = merge_lora(adapted)
    inputs = random_inputs(merged.config)
    assert merged.config.lora_rank == 0
    torch.testing.assert_close(merged(*inputs), adapted(*inputs), atol=1e-5, rtol=0)


def test_nothing_to_train_is_refused(tmp_path, encoder_name, base):
    with pytest.raises(ValueError, match="--tune new leaves nothing to train"):
        run_training(tmp_path / "run", encoder_name, f"--from {base} --tune new")
    with pytest.raises(ValueError, match="was trained with --text"):
        run_training(tmp_path / "run", "minilm", f"--from {base}")


def test_growth_is_recorded_and_what_is_forgotten_is_watched(tmp_path, encoder_name, base):
    options = f"--from {base} --grow depth --where suffix --zero proj --add 1 --steps 4"
    run = run_training(tmp_path / "run", encoder_name, options)
    (model, metadata), old_flops = load_model(run), load_model(base)[1]["flops"]
    event = metadata["history"][1]
    assert (event["where"], event["zero"], model.config.depth) == ("suffix", "proj", 2)
    first, *_, last = (line for line in numbers(run) if "val_loss" in line)
    assert first["flops"] == old_flops and last["flops"] == metadata["flops"]
    (features,) = Prompts(load_captions(), metadata, 0).features
    assert metadata["flops"] - old_flops <= 4 * 4 * cost.count_flops(model, [features.max_length])
    # Growth is function-preserving: the run starts with the loss with which the base ended.
    assert first["old_val_loss"] == pytest.approx(numbers(base)[-1]["val_loss"], rel=1e-4)
    assert all("old_val_loss" not in line for line in numbers(base))
    assert numbers(run)[0]["loss_before_growth"] == pytest.approx(numbers(run)[0]["loss_after_growth"])


def test_plain_copies_change_the_loss_before_the_first_step(tmp_path, encoder_name):
    model = random_model(replace(SMALL, text_dim=16))
    save_checkpoint(tmp_path / "base" / "checkpoint", checkpoint_of(model, text_encoder=encoder_name))
    options = f"--from {tmp_path / 'base'} --grow depth --zero none --steps 1"
    first = numbers(run_training(tmp_path / "run", encoder_name, options))[0]
    assert first["loss_after_growth"] != pytest.approx(first["loss_before_growth"], rel=0.01)


def load_captions():
    """A caption as long as the tiny encoder reads."""
    return ["a red cat surfing a red cat surfing"]


def test_several_growths_at_once(tmp_path, encoder_name, base, capsys):
    options = f"--grow depth,mlp --from {base} --steps 40 --lr 3e-3 --every 40"
    run = run_training(tmp_path / "run", encoder_name, options)
    printed = capsys.readouterr().out
    assert f"base: {base}\n" in printed
    assert "└─ depth: depth 1 -> 2" in printed and "   └─ mlp: mlp_ratio 4 -> 8" in printed
    before, after = re.search(r"loss ([\d.]+) before growth, ([\d.]+) after", printed).groups()
    assert float(before) == pytest.approx(float(after), rel=1e-5)
    val_losses = [line["val_loss"] for line in numbers(run) if "val_loss" in line]
    assert val_losses[-1] < 0.9 * val_losses[0]
    model, metadata = load_model(run)
    assert (model.config.depth, model.config.mlp_ratio) == (2, 8)
    assert [event.get("grow") for event in metadata["history"]] == [None, "depth", "mlp", None]


def test_new_parameters_begin_their_steps_at_zero(tmp_path, encoder_name, base):
    run = run_training(tmp_path / "run", encoder_name, f"--grow depth --from {base} --size 32 --steps 3")
    grown = grow_state(load_checkpoint(base), "depth", add=1)
    end = load_checkpoint(run)
    assert (end.model.config.size, end.model.config.frames) == (32, 4)
    steps = {name: int(entry["step"]) for name, entry in end.optimizer_state.items()}
    assert {steps[name] for name in grown.metadata["new"]} == {3} and steps["final.weight"] == 23


# --------------------------------------------------------------------------------------------------------
# An LLM branch


@pytest.fixture(scope="module")
def with_llm(tmp_path_factory, encoder_name, base, llm_name):
    """A run that has grown an LLM branch, and a block."""
    options = f"--from {base} --grow depth,llm --llm {llm_name} --llm-features last --lr 3e-3 --every 30"
    out = tmp_path_factory.mktemp("runs") / "with-llm"
    return run_training(out, encoder_name, f"{options} --steps 30")


def test_an_llm_branch_is_grown_and_learns(with_llm, llm_name):
    first, *rest = numbers(with_llm)
    assert first["loss_before_growth"] == pytest.approx(first["loss_after_growth"], rel=1e-6)
    val_losses = [line["val_loss"] for line in rest if "val_loss" in line]
    assert val_losses[-1] < 0.95 * val_losses[0]
    model, metadata = load_model(with_llm)
    assert model.config.llm_dim == 16
    assert (metadata["llm"], metadata["llm_features"]) == (llm_name, "last")
    gate = model.blocks[0].adaln_llm.weight.chunk(3)[2]
    assert gate.abs().max() > 0


def test_an_llm_branch_begins_as_the_text_branch(encoder_name, base, llm_name):
    """Aligned to it in closed form (align.py): before training its features point where those do."""
    tr = set_up(parse_arguments(brief("unused", encoder_name, f"--from {base} --grow llm --llm {llm_name}")))
    down = [side.down.weight.flatten() for side in (tr.model.llm_embed, tr.model.text_embed)]
    assert torch.nn.functional.cosine_similarity(*down, dim=0) > 0.5
    assert tr.text_dropout == 0.5
    assert set_up(parse_arguments(brief("unused", encoder_name))).text_dropout == 0


def test_a_run_with_an_llm_is_resumed_and_continued(tmp_path, encoder_name, with_llm):
    again = run_training(tmp_path / "again", encoder_name, f"--from {with_llm} --steps 2")
    resume_training(again, "--steps 4")
    assert numbers(again)[-1]["step"] == 4
    assert load_model(again)[1]["llm"] == load_model(with_llm)[1]["llm"]


def test_a_branch_without_an_llm_is_refused(tmp_path, encoder_name):
    """One that grow.py has made knows of no LLM."""
    config = replace(SMALL, text_dim=16, llm_dim=16)
    save_model(tmp_path, DiT(config).state_dict(), config, text_encoder=encoder_name)
    with pytest.raises(ValueError, match="but names no LLM"):
        run_training(tmp_path / "more", encoder_name, f"--from {tmp_path}")


@pytest.mark.parametrize("options", ["", "--seed 3 --keep", "--steps 100", "--words varied", "--ema 0.9"])
def test_what_to_expect_is_said_of_the_reference_alone(options, capsys):
    args = train.parse_arguments(options.split())
    args.batch = 32  # as `pick_batch` says
    say_what_to_expect(args)
    said = "expect a validation loss" in capsys.readouterr().out
    assert said == (options in ("", "--seed 3 --keep"))


FREED_MEMORY = """
import resource, sys, torch, machine
if sys.argv[1:]:
    machine.keep_freed_memory()
for i in range(9):
    small = [torch.ones(2**17 + i) for _ in range(200)]  # of half a megabyte
    large = [torch.ones(2**21) for _ in range(20)]  # of 8 megabytes
    del large, small
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_kept():
    """What was freed is used again without asking the system for each of its pages."""
    faults = []
    for option in ([], ["keep"]):
        done = subprocess.run([sys.executable, "-c", FREED_MEMORY, *option], capture_output=True, text=True)
        faults.append(int(done.stdout))
    assert faults[0] > 100_000 and faults[1] < 1_000, faults
