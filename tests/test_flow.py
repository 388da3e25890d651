"""The flow: where timesteps fall in training and sampling, the validation loss, and details of the solver.

The closed form of the loss, the order of the solver and guidance are in test_all.py.
"""

import math

import numpy as np
import pytest
import torch

import flow

SHAPE = (2, 3, 2, 4, 4)


def prompt_of(noise):
    """-> a prompt of three tokens for each clip, and the null prompt, which has two."""
    text, mask = torch.ones(len(noise), 3, 4), torch.ones(len(noise), 3, dtype=torch.bool)
    return (text, mask), (torch.zeros(1, 2, 4), mask[:1, :2])


class Recorder:
    """A model that predicts what it sees, and keeps the timesteps."""

    def __init__(self):
        self.times, self.sizes = [], []

    def __call__(self, x, t, text, mask):
        assert (t == t[0]).all() and t.shape == (len(x),)
        self.times.append(t[0].item())
        self.sizes.append(len(x))
        return x


def test_the_distribution_of_training_timesteps():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for shape, mean in (((8, 32, 32), -1), ((16, 64, 64), -1 - math.log(8) / 2)):
        shift = flow.shift_of(shape)
        t = flow.logit_normal(normal, shift)
        logits = torch.log(t / (1 - t))
        assert logits.mean() == pytest.approx(mean, abs=0.01) and logits.std() == pytest.approx(
            0.65, abs=0.01
        )
        last = flow.solver_times(10, shift)[-2]
        assert (t > last).float().mean() < 0.001, "the solver goes where training hardly went"


def test_the_shift_is_that_of_stable_diffusion_3():
    """Its equation 23, where timesteps count the noise: t_m = a t_n / (1 + (a - 1) t_n), a = sqrt(m / n)."""
    times = flow.solver_times(10, shift=math.log(math.sqrt(8)))
    reference = flow.solver_times(10, shift=0.0)
    for t, unshifted in zip(times, reference, strict=True):
        noise = 1 - unshifted
        assert 1 - t == pytest.approx(math.sqrt(8) * noise / (1 + (math.sqrt(8) - 1) * noise))
    assert reference == [0.75 * i / 9 for i in range(10)] + [1.0]  # to the bit


def test_guidance_and_steps_are_shifted_alike():
    """A clip of four times the pixels takes as many guided steps."""
    guided = []
    for size in (32, 64):
        seen, noise = Recorder(), torch.zeros(1, 3, 8, size, size)
        flow.solve(seen, noise, *prompt_of(noise), guidance=2.0, method="euler")
        guided.append((seen.sizes, seen.times))
    assert guided[0][0] == guided[1][0] and set(guided[0][0]) == {1, 2}
    assert all(large < small for small, large in zip(guided[0][1][1:], guided[1][1][1:], strict=True))


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_steps_divide_the_time_before_the_last_one(steps):
    seen = Recorder()
    noise = torch.zeros(SHAPE)
    flow.solve(seen, noise, *prompt_of(noise), steps=steps, method="euler")
    assert seen.times == pytest.approx(np.linspace(0, 0.75, steps).tolist())


def test_heun_looks_at_both_ends_of_a_step_but_the_last():
    seen, done = Recorder(), []
    noise = torch.zeros(SHAPE)
    flow.solve(seen, noise, *prompt_of(noise), steps=4, progress=lambda: done.append(len(seen.times)))
    assert seen.times == pytest.approx([0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])
    assert done == [2, 4, 6, 7]


def test_guidance_doubles_the_batch_inside_its_interval_alone():
    sizes, noise = [], torch.zeros(2, 3, 2, 4, 4)

    def model(x, t, text, mask):
        sizes.append(len(x))
        return x

    flow.solve(model, noise, *prompt_of(noise), steps=4, guidance_interval=(0.2, 0.6))
    # The timesteps are 0, .25, .25, .5, .5, .75, .75.
    assert sizes == [2, 4, 4, 4, 4, 2, 2]


def test_one_step_by_hand():
    """Two steps of each method, for a model that predicts a number which depends on t and x."""

    def model(x, t, text, mask):
        return 0.5 * x + t.view(-1, 1, 1, 1, 1)

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    first = 0.5 * noise - noise  # velocity at 0
    x = noise + 0.75 * first
    middle = (0.5 * x + 0.75 - x) / 0.25  # and at 0.75
    euler = flow.solve(model, noise, *prompt_of(noise), steps=2, guidance=1, method="euler")
    assert torch.allclose(euler, x + 0.25 * middle, atol=1e-6)
    x = noise + 0.75 * (first + middle) / 2
    heun = flow.solve(model, noise, *prompt_of(noise), steps=2, guidance=1)
    assert torch.allclose(heun, 0.5 * x + 0.75, atol=1e-6)  # Euler's last step lands on the prediction
    assert not torch.allclose(euler, heun, atol=0.1)


def test_no_solver_of_that_name():
    noise = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="no solver is called 'rk4'"):
        flow.solve(Recorder(), noise, *prompt_of(noise), method="rk4")


def test_the_null_prompt_is_padded_to_the_prompt():
    text, mask = torch.ones(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)
    null = torch.full((1, 2, 4), 7.0), torch.tensor([[True, True]])
    padded, padded_mask = flow.like_prompt(null, (text, mask))
    assert padded.shape == text.shape and (padded[:, :2] == 7).all() and (padded[:, 2:] == 0).all()
    assert padded_mask.tolist() == 3 * [[True, True, False, False, False]]


def test_sampling_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    noise = torch.zeros(SHAPE)
    out = flow.solve(lambda x, t, text, mask: weight * x, noise, *prompt_of(noise), steps=2)
    assert not out.requires_grad


# --------------------------------------------------------------------------------------------------------
# The validation loss


class GreyModel(torch.nn.Module):
    """Predicts a grey, and keeps the timesteps and prompts."""

    def __init__(self):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(0.0))
        self.t, self.text = [], []

    def forward(self, x_t, t, text):
        self.t.append(t)
        self.text.append(text)
        return self.grey.expand_as(x_t)


class Clips:
    """A data set of `count` clips: clip i is white noise of size 1 + i, and its caption is its number."""

    def __init__(self, count):
        self.captions = [str(i) for i in range(count)]
        self.videos = torch.randn(count, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        self.videos *= torch.arange(1, count + 1).view(-1, 1, 1, 1, 1)

    def __len__(self):
        return len(self.captions)

    def batch(self, rows):
        return self.videos[rows]


class Numbers:
    """Prompts: the features of a caption are its number."""

    def batch(self, texts):
        return (torch.tensor([float(text) for text in texts]),)


@pytest.mark.parametrize("count", [3, 64, 100])
def test_validation_loss_of_a_grey_model(count):
    """It has the variance of the data over (1 - t)^2; with 3 clips each of them serves many times."""
    model, clips = GreyModel(), Clips(count)
    by_t = flow.validation_loss(model, clips, Numbers())
    t, rows = torch.cat(model.t), torch.cat(model.text).long()
    assert len(t) == max(count, 64)
    assert torch.equal(rows, torch.arange(len(t)) % count), "a clip has the caption of another"
    expected = clips.videos.square().mean((1, 2, 3, 4))[rows] / (1 - t) ** 2
    slices = torch.special.ndtr((torch.logit(t) + 1) / 0.65) * flow.T_BINS  # 0 to 8, by the quantile of t
    assert torch.equal(slices.long(), torch.arange(len(t)) % flow.T_BINS)
    means = [expected[slices.long() == b].mean().item() for b in range(flow.T_BINS)]
    assert by_t.tolist() == pytest.approx(means, rel=1e-4)
    assert torch.equal(by_t, flow.validation_loss(model, clips, Numbers())), "its draws are not fixed"


def test_validation_runs_in_the_precision_of_training():
    seen = []

    class Noting(GreyModel):
        def forward(self, x_t, t, text):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x_t, t, text)

    for precision in (torch.bfloat16, None):
        flow.validation_loss(Noting(), Clips(3), Numbers(), precision)
    assert seen == [True, False]
