"""The tutorial's claims, as assertions. Read this file after the code, or in its place.

Each chapter is about one file, in the reading order of README, and begins with what that file promises. A
test is one promise; its name says which. None compares a run with a stored number. There are four kinds:

    reference      the same thing computed in another way: with loops, in closed form, by autograd
    property       what must hold for any weights: padding is invisible, growth changes nothing
    convergence    a number goes where theory says: the solver's order, a loss that falls
    determinism    twice the same, bit for bit

Networks are small, and most have random weights everywhere (`random_model`): in a new model the gates are
zero, so many mistakes would not be seen. Robustness (hostile files, wrong options, kills) is in tests/.

`pytest` runs all; `pytest -m "not slow"` leaves out what takes long.
"""

import copy
import itertools
import math
import re
import runpy
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dit
import draw
import flow
import grow
import start
import train
from align import align, swap
from attention import attention
from conftest import SMALL, call, checkpoint_of, gradients, random_inputs, random_model, same_run
from data import COLOURS, HELD_OUT_PAIRS, KINDS, MOTIONS, WORDS
from dit import DiT
from draw import Actor, Scene
from lab.evaluate import score
from lab.reader import labels
from run import Checkpoint, load_model
from text_encoder import NULL_PROMPT, Features, Prompts

HERE = Path(__file__).parent
WITH_LLM = replace(SMALL, llm_dim=10)


def difference(a, b) -> float:
    """How far `a` is from `b`, relative to the size of `b`."""
    return ((a - b).norm() / b.norm()).item()


# --------------------------------------------------------------------------------------------------------
# attention.py: three lines of maths. Every backend computes them; the kernel's tests are in tests/.


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_attention_against_loops(backend):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (5, 4, 4))
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    out = attention(q, k, v, mask, backend)
    for b, h, i in np.ndindex(2, 3, 5):
        total, expected = 0.0, torch.zeros(8, dtype=torch.float64)
        for j in range(4):
            if mask[b, j]:
                weight = math.exp((q[b, h, i] @ k[b, h, j]) / math.sqrt(8))
                total += weight
                expected += weight * v[b, h, j]
        assert torch.allclose(out[b, h, i], expected / total, atol=1e-12)
    assert torch.equal(attention(q, k, v, None, backend), attention(q, k, v, mask | True, backend))


# --------------------------------------------------------------------------------------------------------
# dit.py: the network uses everything that it is given, and nothing else. Block by block it is compared with
# formulas in tests/test_dit.py.


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_norms_against_torch(dtype, error):
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 5, 16, generator=g, dtype=torch.float64)
    ours = dit.rms_norm(x.to(dtype))
    assert ours.dtype == dtype and difference(ours, F.rms_norm(x, (16,), eps=1e-6)) < error
    shift, scale = torch.randn(2, 2, 1, 16, generator=g, dtype=torch.float64)
    expected = F.layer_norm(x, (16,)) * (1 + scale) + shift
    tokens = x if dtype == torch.float64 else x.float()  # the residual stream has no 16 bits
    ours = dit.modulate(tokens, shift.to(dtype), scale.to(dtype))
    assert ours.dtype == dtype and difference(ours, expected) < error


def test_rotary_positions_are_relative():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 32, generator=g, dtype=torch.float64)

    def product(a, b):
        """q at place `a` times k at place `b`."""
        turned = []
        for vector, place in ((q, a), (k, b)):
            cos, sin = dit.rope_cos_sin(torch.tensor([place], dtype=torch.float64), 32)
            turned.append(dit.rotate(vector, cos, sin))
        return (turned[0] * turned[1]).sum()

    here = product((1, 2, 3), (4, 1, 0))
    assert torch.allclose(product((3, 5, 4), (6, 4, 1)), here)
    for other in ((4, 1, 1), (4, 2, 0), (5, 1, 0)):  # each axis matters
        assert not torch.allclose(product((1, 2, 3), other), here)


def test_a_new_model_predicts_grey():
    assert (DiT(SMALL)(*random_inputs()) == 0).all()


def llm_inputs(batch=2, length=6, dtype=torch.float32):
    """-> features of an LLM and their mask; the last prompt is shorter."""
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    return torch.randn(batch, length, WITH_LLM.llm_dim, generator=g, dtype=dtype), mask


def test_padding_is_invisible():
    model = random_model(WITH_LLM, dtype=torch.float64)
    x, t, *prompts = random_inputs(dtype=torch.float64) + llm_inputs(dtype=torch.float64)
    padded = []
    for features, mask in zip(prompts[::2], prompts[1::2], strict=True):
        padded.append(torch.cat([features, torch.randn(2, 3, features.shape[2])], 1))
        padded.append(torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    assert torch.allclose(model(x, t, *padded), model(x, t, *prompts), atol=1e-12)


def test_every_input_matters():
    """Let one clip of a batch have an input of the other: its own prediction changes, and by no little. The
    prediction for the other clip does not."""
    model = random_model(WITH_LLM, dtype=torch.float64)
    x, _, text, mask = random_inputs(dtype=torch.float64)
    mask[0], mask[1] = True, torch.arange(5) < 2
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    names = ("x_t", "t", "text", "text_mask", "llm", "llm_mask")
    inputs = dict(zip(names, (x, t, text, mask, *llm_inputs(dtype=torch.float64)), strict=True))
    out = model(**inputs)
    for name, value in inputs.items():
        changed = value.clone()
        changed[1] = value[0]
        other = model(**{**inputs, name: changed})
        assert torch.allclose(other[0], out[0], atol=1e-12), f"{name} of a clip acts on another clip"
        assert difference(other[1], out[1]) > 0.05, f"{name} does not matter"


@pytest.mark.parametrize("axis", ["time", "height", "width"])
@pytest.mark.parametrize("kind", ["absolute", "rotary"])
def test_every_position_matters(kind, axis, monkeypatch):
    """Move all patches by one place, around the edge. Without positions their predictions would only move
    along. Each of the two kinds of position is enough to see where a patch is."""
    model = random_model(dtype=torch.float64)
    if kind == "absolute":
        for block in model.blocks:
            torch.nn.init.zeros_(block.attn.proj.weight)
    else:
        monkeypatch.setattr(dit, "position_embedding", lambda positions, n: torch.zeros(len(positions), n))
    x, *prompt = random_inputs(dtype=torch.float64)
    move = {"time": ((2,), (2,)), "height": ((4,), (3,)), "width": ((4,), (4,))}[axis]  # pixels, dimension
    moved = model(x.roll(*move), *prompt)
    assert difference(moved, model(x, *prompt).roll(*move)) > 0.02


# --------------------------------------------------------------------------------------------------------
# flow.py: the loss is that of the velocity x - noise. The solver follows the velocity to the clip.


def test_loss_against_closed_form():
    x, _, text, mask = random_inputs()
    t = torch.tensor([0.5, 0.99])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    s = t.view(-1, 1, 1, 1, 1)

    def grey(x_t, t, text, mask):
        return torch.zeros_like(x_t)

    def recover(x_t, t, text, mask):  # from a point on the line, for a model that is told the noise
        return (x_t - (1 - s) * noise) / s

    def velocity(x_t, t, text, mask):  # 0.3 everywhere
        return x_t + (1 - s) * 0.3

    loss = flow.flow_loss(grey, x, t, noise, (text, mask))
    variance = x.square().mean((1, 2, 3, 4))
    assert torch.allclose(loss, variance / torch.tensor([0.5**2, 0.05**2]))  # 1 - t is at least 0.05
    assert flow.flow_loss(recover, x, t, noise, (text, mask)).max() < 1e-6
    loss = flow.flow_loss(velocity, x, t, noise, (text, mask))
    assert torch.allclose(loss[0], (0.3 - (x - noise)[0]).square().mean())


def gaussian_model(x_t, t, text, mask, scale=0.5):
    """The best prediction for clips that are white noise of size `scale`: E[x | x_t] in closed form. The flow
    then only rescales, x_t = noise sqrt(t^2 scale^2 + (1 - t)^2), and ends at scale * noise."""
    t = t.view(-1, 1, 1, 1, 1)
    return t * scale**2 / (t**2 * scale**2 + (1 - t) ** 2) * x_t


def follow(model, noise, **options):
    """`flow.solve` with a prompt of three tokens; the null prompt has two."""
    text, mask = torch.ones(len(noise), 3, 4), torch.ones(len(noise), 3, dtype=torch.bool)
    null = torch.zeros(1, 2, 4), mask[:1, :2]
    return flow.solve(model, noise, (text, mask), null, **options)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_the_solver_converges_at_its_order(method, order, monkeypatch):
    noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 40, 80):
        monkeypatch.setattr(flow, "LAST_STEP", 1 - 1 / steps)  # steps of equal size
        out = follow(gaussian_model, noise, steps=steps, method=method)
        errors.append((out - 0.5 * noise).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_last_step_lands_on_the_prediction(method):
    g = torch.Generator().manual_seed(0)
    clip, noise = torch.rand(2, 2, 3, 2, 4, 4, generator=g)

    def certain(x, t, text, mask):
        return clip.repeat(len(x) // 2, 1, 1, 1, 1)

    for steps in (1, 7):
        assert torch.allclose(follow(certain, noise, steps=steps, method=method), clip, atol=1e-6)


def test_guidance_moves_away_from_the_null_prompt_within_its_interval():
    batches = []

    def model(x, t, text, mask):  # 1 for the prompt, 0.5 for the null prompt, which has a token less
        batches.append(len(x))
        return torch.where(mask[:, 2], 1.0, 0.5).view(-1, 1, 1, 1, 1).expand_as(x)

    noise = torch.zeros(2, 3, 2, 4, 4)
    assert torch.allclose(follow(model, noise, steps=4, guidance=1.0), torch.tensor(1.0))
    assert set(batches) == {2}, "without guidance the null prompt costs nothing"
    guided = follow(model, noise, steps=4, guidance=3.0, guidance_interval=(0, 1))
    assert torch.allclose(guided, torch.tensor(0.5 + 3 * (1 - 0.5)))
    batches.clear()
    follow(model, noise, steps=4, method="euler", guidance_interval=(0.2, 0.6))  # at 0, 0.25, 0.5, 0.75
    assert batches == [2, 4, 4, 2]


# --------------------------------------------------------------------------------------------------------
# grow.py: a grown model computes what its base computed; then what is new learns, from its first steps on.

GROWTHS = [
    ("depth", {"add": 3}),
    ("depth", {"add": 2, "where": "prefix", "zero": "proj"}),
    ("depth", {"add": 2, "where": "suffix", "zero": "both"}),
    ("width", {}),
    ("width", {"factor": 3}),
    ("mlp", {}),
    ("llm", {"llm_dim": 7}),
    ("resolution", {"frames": 8, "size": 32}),
    ("lora", {"rank": 3}),
]


@pytest.mark.parametrize("operator, options", GROWTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_growth_changes_nothing(operator, options, dtype, tolerance):
    base, inputs = random_model(dtype=dtype), random_inputs(dtype=dtype)
    before = copy.deepcopy(base.state_dict())
    truth = call(base, inputs)
    out = call(grow.OPERATORS[operator](base, **options), inputs)
    assert truth.std() > 0.1 and out.dtype == dtype
    if operator in grow.EXACT:
        assert torch.equal(out, truth)
    assert (out - truth).abs().max() < tolerance
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_larger_patches_enlarge_what_the_base_makes_of_the_reduced_clip(dtype, tolerance):
    base = random_model(dtype=dtype)
    grown = grow.grow_patch(base, 3)
    assert grown.config.size == 3 * base.config.size and grown.config.tokens() == base.config.tokens()
    large, t, *prompt = random_inputs(grown.config, dtype=dtype)
    reduced = F.avg_pool3d(large, (1, 3, 3))
    truth = F.interpolate(base(reduced, t, *prompt), scale_factor=(1, 3, 3))
    assert truth.std() > 0.1 and difference(grown(large, t, *prompt), truth) < tolerance


def test_plain_stacking_is_another_function():
    base, inputs = random_model(), random_inputs()
    assert difference(grow.grow_depth(base, 3, zero="none")(*inputs), base(*inputs)) > 0.2


@pytest.mark.parametrize(
    "operator, options",
    [
        ("depth", {"add": 3, "zero": "gate"}),
        ("depth", {"add": 3, "zero": "proj"}),
        ("depth", {"add": 3, "zero": "none"}),
        ("depth", {"add": 2, "where": "prefix"}),
        ("depth", {"add": 2, "where": "suffix", "zero": "proj"}),
        ("llm", {"llm_dim": 7}),
        ("lora", {"rank": 3}),
    ],
)
def test_what_is_new_learns_by_the_second_step(operator, options):
    grown = grow.grow_state(checkpoint_of(random_model()), operator, **options)
    model, new, inputs = grown.model, grown.metadata["new"], random_inputs()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradients(model, inputs)
    optimizer.step()
    found = gradients(model, inputs)
    assert new and all(found[name].abs().max() > 0 for name in new)
    if operator == "depth":  # neighbors with equal weights, two copies or a copy and its original, differ now
        number = max(int(name.split(".")[1]) for name in new)
        copied, neighbor = (f"blocks.{i}.mlp.up.weight" for i in (number, number - 1))
        assert not torch.equal(found[copied], found[neighbor])


def test_what_is_zeroed_twice_is_dead():
    grown = grow.grow_state(checkpoint_of(random_model()), "depth", add=3, zero="both")
    model, new, inputs = grown.model, grown.metadata["new"], random_inputs()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):
        found = gradients(model, inputs)
        assert all((found[name] == 0).all() for name in new)
        optimizer.step()
    assert len(new) == 3 * 16 and all(torch.equal(model.get_parameter(n), before[n]) for n in new)


@pytest.mark.parametrize(
    "steps",
    [
        [("depth", {"add": 3})],
        [("depth", {"add": 3, "zero": "proj", "where": "prefix"})],
        [("width", {"factor": 3, "noise": 0.0})],
        [("mlp", {"noise": 0.0})],
        [("llm", {"llm_dim": 7})],
        [("resolution", {"frames": 8})],
        [("depth", {"add": 2}), ("width", {"noise": 0.0}), ("depth", {"add": 5})],
    ],
)
def test_moments_are_those_that_the_grown_model_would_have(steps):
    """exp_avg is a mean of gradients, so it has to become what gradients become: compared with autograd."""
    base, inputs = random_model(dtype=torch.float64), random_inputs(dtype=torch.float64)
    state = {}
    for name, gradient in gradients(base, inputs).items():
        state[name] = {"step": torch.tensor(40.0), "exp_avg": gradient, "exp_avg_sq": gradient**2}
    before = checkpoint_of(base, state)
    grown = before
    for operator, options in steps:
        grown = grow.grow_state(grown, operator, **options)
    truth = gradients(grown.model, inputs)
    assert grown.optimizer_state.keys() == truth.keys() - set(grown.metadata["new"])  # new: step 0
    for name, entry in grown.optimizer_state.items():
        assert torch.allclose(entry["exp_avg"], truth[name], rtol=1e-9, atol=1e-15), name
        assert torch.allclose(entry["exp_avg_sq"], truth[name] ** 2, rtol=1e-9, atol=1e-25), name
        assert entry["step"] == 40
    for old, new in ((before.model, grown.model), (before.ema, grown.ema)):
        assert (call(new, inputs) - call(old, inputs)).abs().max() < 1e-12


def adamw(model, state, lr=1e-4, beta2=0.95):
    """AdamW as train.py has it, with the state of some parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, beta2), weight_decay=0.0)
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = copy.deepcopy(state[name])
    return optimizer


@pytest.mark.parametrize("beta2, wrong", [(0.999, 3.16), (0.95, 0.447)])
def test_first_updates_have_the_right_length(beta2, wrong):
    """A new parameter takes a first step of one learning rate. With zero moments under an old step count it
    would be (1 - beta1) / sqrt(1 - beta2)."""
    base, inputs = random_model(), random_inputs()
    optimizer = adamw(base, {}, beta2=beta2)
    for _ in range(40):
        gradients(base, inputs)
        optimizer.step()
    state = {name: optimizer.state[p] for name, p in base.named_parameters()}
    grown = grow.grow_state(checkpoint_of(base, state), "depth", add=3)
    trap = {}
    for name in grown.metadata["new"]:
        zeros = torch.zeros(2, *grown.model.get_parameter(name).shape)
        trap[name] = {"step": torch.tensor(1e5), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    for added, expected in (({}, 1), (trap, wrong)):
        model = copy.deepcopy(grown.model)
        optimizer = adamw(model, {**grown.optimizer_state, **added}, beta2=beta2)
        gradients(model, inputs)
        optimizer.step()
        updates = [model.get_parameter(n) - grown.model.get_parameter(n) for n in grown.metadata["new"]]
        assert max(u.abs().max().item() for u in updates) / 1e-4 == pytest.approx(expected, rel=0.02)
        assert optimizer.state[model.get_parameter("final.weight")]["step"] == 41


# --------------------------------------------------------------------------------------------------------
# train.py: the loop learns, and growth does not disturb it. A single step, its random numbers, the learning
# rate and the EMA are compared with formulas in tests/test_train.py.


class WordPrompts(Prompts):
    """In place of `Prompts`: each word has a random vector of 12 channels; an LLM of 12 channels has the same
    vectors with the channels in another order."""

    def __init__(self, texts, metadata, llm_dim, device="cpu"):
        texts = sorted({NULL_PROMPT, *texts})
        vectors, lengths = [], []
        for text in texts:
            words = ["<start>", *text.split()]
            for word in words:
                g = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                vectors.append(torch.randn(12, generator=g))
            lengths.append(len(words))
        flat, lengths = torch.stack(vectors), torch.tensor(lengths)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        self.features = [Features(texts, flat, lengths)]
        if llm_dim:
            self.features.append(Features(texts, flat[:, order], lengths))
        self.null = self.features[0].row_of[NULL_PROMPT]


def options_of(out, more=""):
    """The options of a small training in the folder `out`."""
    line = f"--quick --depth 1 --frames 4 --size 16 --precision fp32 --device cpu --out {out} {more}"
    return train.parse_arguments(line.split())


def test_training_learns(tmp_path):
    """The whole loop over-fits four clips: the loss falls by far, and the EMA draws for each caption a video
    that is closer to its clip than to any other."""
    args = options_of(tmp_path / "run", "--clips 4 --batch 16 --steps 250 --every 250 --warmup 20")
    run = train.train(args, WordPrompts)
    losses = [float(loss) for loss in re.findall(r'"loss": ([\d.]+)', (run / "metrics.jsonl").read_text())]
    assert losses[-1] < 0.2 * losses[0]
    model, metadata = load_model(run)
    clips = data.ToyDataset("basic", 4, frames=4, size=16)
    prompts = WordPrompts(clips.captions, metadata, 0)
    noise = torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    out = flow.solve(model, noise, prompts.batch(clips.captions), prompts.batch([NULL_PROMPT]), steps=6)
    distance = (out[:, None] - clips.batch(range(4))[None]).square().mean((2, 3, 4, 5))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]


def losses_from(tr, step, count):
    """Train from `step` on, at a constant learning rate -> losses (count,)."""
    losses = []
    for i in range(step, step + count):
        tr.lr.fill_(2e-3)
        losses.append(train.training_step(tr, train.random_batch(tr, 0, i, 32)))
        assert not losses[-1].requires_grad, "with its graph a loss would keep the memory of its step"
    return torch.stack(losses)


def test_growth_in_the_middle_of_training_has_no_spike(tmp_path):
    """The first losses after growth against those of the model that did not grow, on the same draws. Plain
    copies show that a spike would be seen. Width has a small one, since moments ignore its noise."""
    args = options_of(tmp_path / "run", "--clips 256")
    tr = start.set_up(args, WordPrompts)
    args.drop_text = 0.0  # of the model that reads with an LLM
    losses_from(tr, 0, 150)
    state = {name: tr.optimizer.state[p] for name, p in tr.model.named_parameters()}
    base = copy.deepcopy(Checkpoint(tr.model, tr.ema, state, tr.metadata, tr.trainer_state))
    continued = losses_from(tr, 150, 4)
    for operator, options, least, most in (
        ("depth", {"add": 2}, 0.98, 1.03),
        ("mlp", {}, 0.98, 1.03),
        ("llm", {"llm_dim": 12}, 0.98, 1.03),
        ("width", {}, 0.98, 1.08),
        ("depth", {"add": 2, "zero": "none"}, 1.15, 9),
    ):
        grown = grow.grow_state(copy.deepcopy(base), operator, **options)
        prompts = WordPrompts(tr.data.texts(), grown.metadata, grown.model.config.llm_dim)
        after = losses_from(start.build(args, grown, tr.data, prompts, tr.device), 150, 4)
        ratio = (after.mean() / continued.mean()).item()
        assert least < ratio < most, (operator, options, ratio)
        if options.get("zero") != "none":
            assert after[0].item() == pytest.approx(continued[0].item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------------
# align.py: a new LLM branch reads the LLM as the branch to the text reads the text, without training.


def test_an_aligned_branch_reads_the_llm_as_it_reads_the_text():
    captions = data.captions_of(data.make_scenes("basic", 500))
    prompts = WordPrompts(captions, {}, 12)
    model = random_model()
    grown = grow.grow_llm(model, 12)
    x, t, *_ = random_inputs()
    inputs = prompts.batch(captions[:2])
    text, mask, llm, llm_mask = inputs
    expected = model(x, t, text, mask)
    unaligned = copy.deepcopy(grown)
    align((grown,), prompts, captions)
    assert torch.equal(grown(x, t, *inputs), expected), "the new gates are still zero"
    swap(grown)  # the gates of the text's branch go to the LLM's
    swap(unaligned)
    nothing = torch.zeros_like(text)
    assert difference(grown(x, t, nothing, mask, llm, llm_mask), expected) < 0.02
    assert difference(unaligned(x, t, nothing, mask, llm, llm_mask), expected) > 0.1


# --------------------------------------------------------------------------------------------------------
# draw.py and data.py: a caption is true because both it and the pixels are made from one scene.


def path_of(motion):
    """Where a moving actor is: x and y (T,) in pixels. It is found where two clips differ in which only its
    color does."""
    scenes = [Scene((Actor("car", colour, motion),), "meadow", 11) for colour in ("red", "blue")]
    red, blue = draw.render(scenes, 8, 64).float()
    mass = (red - blue).abs().sum(0)  # (T, H, W)
    axis = torch.arange(64.0)
    total = mass.sum((1, 2))
    return mass.sum(1) @ axis / total, mass.sum(2) @ axis / total


def test_pixels_move_as_the_caption_says():
    steps = {}
    for motion in MOTIONS:
        x, y = path_of(motion)
        steps[motion] = x.diff(), y.diff()
    assert (steps["left"][0] < -2).all() and (steps["right"][0] > 2).all()
    assert (steps["up"][1] < -2).all() and (steps["down"][1] > 2).all()
    assert steps["still"][0].abs().max() < 0.01 and steps["still"][1].abs().max() < 0.01
    assert steps["bounce"][1].min() < -2 < 2 < steps["bounce"][1].max()
    assert steps["spin"][0].abs().max() < 2
    assert (steps["surf"][0] > 1).all() and steps["surf"][1].abs().max() > 1


def test_held_out_pairs_stay_out_of_training():
    """No training clip shows a surfing cat; scores on held-out pairs are about those alone."""
    scenes = data.make_scenes("basic", 3000) + data.make_scenes("rich", 1000)
    pairs = {(actor.kind, actor.motion) for scene in scenes for actor in scene.actors}
    assert ("cat", "surf") in HELD_OUT_PAIRS and not pairs & set(HELD_OUT_PAIRS)
    assert len(pairs) == len(KINDS) * len(MOTIONS) - len(HELD_OUT_PAIRS)  # and all others come up
    held_out = [scene.actors[0] for scene in data.make_scenes("basic", 100, pairs="held_out")]
    assert {(actor.kind, actor.motion) for actor in held_out} == set(HELD_OUT_PAIRS)
    everything = [scene.actors[0] for scene in data.make_scenes("basic", 2000, pairs="all")]
    share = sum((actor.kind, actor.motion) in HELD_OUT_PAIRS for actor in everything) / 2000
    assert abs(share - 1 / len(MOTIONS)) < 0.03


def words_in(text) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def test_held_out_words_stay_out_of_training():
    """No training caption has a *feline*."""
    seen = set()
    for which, count in (("basic", 3000), ("rich", 1000)):
        scenes = data.make_scenes(which, count)
        for style, vocabulary in itertools.product(("short", "detailed"), ("train", "varied")):
            for text in data.captions_of(scenes, style, vocabulary):
                seen |= words_in(text)
    for concept in WORDS.values():
        for trained, held_out, more in concept.values():
            assert len(trained) == len(held_out) == 2 and len(more) == 3
            for phrase in (*trained, *more):
                assert words_in(phrase) <= seen
            for phrase in held_out:  # at least one word of the phrase is new
                assert words_in(phrase) - seen, f"{phrase!r} is in training captions"


# --------------------------------------------------------------------------------------------------------
# run.py: a run that was killed and resumed is the run that was not.


def test_resume_is_exact_to_the_bit(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(options_of(whole, "--clips 16"), WordPrompts)

    def killed_at_step_16(ema, model, step, decay, update=train.update_ema):
        if step == 16:  # the last checkpoint is that of step 10
            raise KeyboardInterrupt
        update(ema, model, step, decay)

    monkeypatch.setattr(train, "update_ema", killed_at_step_16)
    with pytest.raises(KeyboardInterrupt):
        train.train(options_of(killed, "--clips 16"), WordPrompts)
    monkeypatch.undo()
    train.train(train.parse_arguments(["--resume", "--out", str(killed)]), WordPrompts)
    assert same_run(killed, whole)
    assert not same_run(
        train.train(options_of(tmp_path / "other", "--clips 16 --seed 1"), WordPrompts), whole
    )


# --------------------------------------------------------------------------------------------------------
# lab/: the judge counts what is right.


class Oracle:
    """In place of the reader: it knows the scenes, and gives the logits of the truth."""

    def __init__(self, scenes):
        self.truth = labels(scenes)

    def __call__(self, videos):
        logits = {"presence": self.truth["presence"], "place": self.truth["place"]}
        for name, classes in (("motion", 8), ("background", 5)):
            logits[name] = F.one_hot(self.truth[name].clamp_min(0), classes).float()
        logits["colour"] = F.one_hot(self.truth["colour"][..., 0].clamp_min(0), 6).float()
        return logits


def test_scores_count_what_is_right():
    scenes = data.make_scenes("basic", 60, seed=1)
    videos = torch.zeros(60, 3, 8, 32, 32)
    assert set(score(Oracle(scenes), videos, scenes).values()) == {1.0}
    colours, kinds = [], []  # a quarter of the clips shows another color, or another kind at night
    for scene in scenes[:15]:
        actor = scene.actors[0]
        colour = COLOURS[COLOURS.index(actor.colour) - 1]
        kind = KINDS[KINDS.index(actor.kind) - 1]
        colours.append(replace(scene, actors=(replace(actor, colour=colour),)))
        kinds.append(replace(scene, actors=(replace(actor, kind=kind),), background="night"))
    scores = score(Oracle(colours + scenes[15:]), videos, scenes)
    assert scores["colour"] == scores["all"] == 0.75
    assert scores["subject"] == scores["motion"] == scores["background"] == scores["place"] == 1
    scores = score(Oracle(kinds + scenes[15:]), videos, scenes)
    assert scores["subject"] == scores["all"] == 0.75 and scores["colour"] == 1  # of the kind that is there
    nights = sum(scene.background == "night" for scene in scenes[:15])
    assert scores["background"] == pytest.approx((45 + nights) / 60)


# --------------------------------------------------------------------------------------------------------
# The commands of the README. tests/test_commands.py runs them one after the other, as a user would.

COMMANDS = (
    "train.py", "sample.py", "grow.py", "align.py", "data.py", "text_encoder.py", "recaption.py",
    "-m lab.evaluate", "-m lab.reader", "-m lab.study", "-m lab.bench",
)  # fmt: skip


def help_of(command, capsys, monkeypatch) -> str:
    """What `python COMMAND --help` prints. It must end with status 0."""
    name = command.removeprefix("-m ")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        if command.startswith("-m"):
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(HERE / name), run_name="__main__")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:'lab.*found in sys.modules")
def test_every_command_has_help(command, capsys, monkeypatch):
    assert f"usage: {command.removeprefix('-m ').split('.')[0]}" in help_of(command, capsys, monkeypatch)


def commands_in(file):
    """-> {command: options that the file gives it}; commands are `python FILE.py ...` and `python -m ...`."""
    found = {}
    for command, rest in re.findall(r"python (\w+\.py|-m lab\.\w+)([^`\n#]*)", file.read_text()):
        found.setdefault(command, set()).update(re.findall(r"--[a-z-]+", rest))
    return found


@pytest.mark.filterwarnings("ignore:'lab.*found in sys.modules")
def test_every_command_of_the_readme_exists(capsys, monkeypatch):
    for file in (HERE / "README.md", HERE / "results" / "README.md", *(HERE / "docs").glob("*.md")):
        for command, options in commands_in(file).items():
            path = command.removeprefix("-m ").replace("lab.", "lab/").removesuffix(".py")
            assert (HERE / f"{path}.py").is_file(), f"{file.name}: python {command}"
            said = help_of(command, capsys, monkeypatch)
            if command == "grow.py":  # it has another command line for a diffusers folder
                said += help_of("command_diffusers.py", capsys, monkeypatch)
            unknown = options - set(re.findall(r"--[a-z-]+", said))
            assert not options or not unknown, f"{file.name}: python {command} {unknown}"
