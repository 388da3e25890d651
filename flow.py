"""Rectified flow, both halves on one page: what a video model is trained to do, and how it makes a clip.

**The path.** A straight line from noise to each clip x (rectified flow, arXiv 2209.03003):

    x_t = t x + (1 - t) noise          t = 0 is noise, t = 1 is the clip

**The loss.** The model predicts the clip x at the end of the line. The velocity that this implies, and the
true one, are

    v = (x_predicted - x_t) / (1 - t)          v_true = (x - x_t) / (1 - t) = x - noise

and the loss is the mean squared difference of the two, that is, the squared error of the clip divided by
(1 - t)^2 (JiT, arXiv 2511.13720: predict x, weigh it as velocity). 1 - t is not taken below MIN_LEFT.

**The distribution of training timesteps** is logit-normal, sigmoid(N(-1, 0.65)): what a clip shows is decided
early, where x_t is mostly noise. JiT takes N(-0.8, 0.8), which draws more late timesteps, whose loss weighs
most (docs/choices.md compares them).

**More pixels, more noise.** A larger clip shows the same scene in more pixels. Neighbours are nearly equal,
so their noise averages out, and at the same t more of the scene is visible. With n times as many pixels the
noise of an average is sqrt(n) times smaller. So all timesteps are shifted towards noise, their logit by
-ln(sqrt(n)) (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2): in training, in the solver, and for the
interval of guidance. The numbers below are for clips of REFERENCE pixels.

**The solver.** A clip is made by following v from pure noise at t = 0 to t = 1. The lines of many clips
cross, so the path that v describes bends, and several steps are needed. `euler` follows the tangent. `heun`
averages the tangents at both ends of a step: two evaluations, and an error of second order. The last step is
always Euler's and lands exactly on the predicted clip, so that nothing is divided by zero. It begins at t =
LAST_STEP, because later timesteps are hardly ever drawn in training. The other steps divide the time before
it evenly.

**Classifier-free guidance** (arXiv 2207.12598). The model was also trained with the null prompt, so it makes
an unconditional prediction too: what clips look like in general. Moving away from it sharpens what the prompt
adds:

    x = x_uncond + guidance (x_cond - x_uncond)

Guidance 1 means none. It acts within an interval of timesteps only (arXiv 2404.07724), here t <= 0.6. Near
t = 1 it changes nothing and costs time. The paper also leaves out small t, where guidance reduces variety.

Left out: other paths than the straight line, other predictions than the clip, pairing of noise with clips,
distilled and adaptive solvers, negative prompts, image conditioning.
"""

import math

import torch

from machine import autocast

T_MEAN, T_STD = -1.0, 0.65  # of the logit of the training timesteps, for clips of REFERENCE pixels
REFERENCE = 8 * 32 * 32  # frames x height x width
MIN_LEFT = 0.05  # 1 - t in the loss is at least this
VALIDATED = 64  # clips at once in validation
T_BINS = 8  # slices of the training timesteps, equally likely, for the validation loss

STEPS = 10  # of the solver
GUIDANCE = 3.0
GUIDANCE_INTERVAL = (0.0, 0.6)  # timesteps at which guidance acts
LAST_STEP = 0.75  # timestep at which the last step of the solver begins

# --------------------------------------------------------------------------------------------------------
# Training


def shift_of(shape) -> float:
    """How far the logits of timesteps are moved towards noise for clips of `shape` (..., T, H, W); not at all
    for small ones."""
    return 0.5 * math.log(max(1.0, math.prod(shape[-3:]) / REFERENCE))


def logit_normal(normal, shift):
    """Standard normal numbers, any shape, and the shift of the clips -> training timesteps in (0, 1):
    sigmoid(N(T_MEAN - shift, T_STD))."""
    return torch.sigmoid(T_MEAN - shift + T_STD * normal)


def flow_loss(model, x, t, noise, prompt):
    """The velocity loss of each clip. x (B, 3, T, H, W) in [-1, 1]; t (B,) in [0, 1); noise like x; prompt:
    the features (B, L, D) and mask (B, L) of each text encoder -> (B,) float32, each the mean over a clip. A
    model that predicts grey has about the variance of the data over (1 - t)^2."""
    s = t.view(-1, 1, 1, 1, 1)
    x_t = s * x + (1 - s) * noise
    predicted = model(x_t, t, *prompt)
    error = (predicted.float() - x) / (1 - s).clamp_min(MIN_LEFT)
    return error.square().mean((1, 2, 3, 4))


def validation_batches(dataset, prompts, device):
    """The clips of `dataset` at fixed noise and at timesteps distributed as in training -> for VALIDATED
    clips at a time the x, t, noise and prompt of `flow_loss`, on the device. Of few clips each is taken
    several times. The draws come from the CPU, so that the numbers agree on all machines."""
    generator = torch.Generator().manual_seed(0)
    for rows in torch.arange(max(len(dataset), 8 * T_BINS)).split(VALIDATED):
        quantiles = (rows % T_BINS + torch.rand(len(rows), generator=generator)) / T_BINS
        rows = rows % len(dataset)
        x = dataset.batch(rows)
        t = logit_normal(torch.special.ndtri(quantiles), shift_of(x.shape))
        noise = torch.randn(x.shape, generator=generator)
        prompt = prompts.batch([dataset.captions[i] for i in rows.tolist()])
        yield x.to(device), t.to(device), noise.to(device), prompt


@torch.no_grad()
def loss_by_timestep(model, batches, precision=None):
    """The loss on `validation_batches` -> (T_BINS,) means over equally likely slices of the timesteps, on the
    CPU: which part of the way from noise to clip is hard. `precision` is the autocast type, None for
    float32."""
    device = next(model.parameters()).device
    losses = []
    for batch in batches:
        with autocast(device, precision):
            losses.append(flow_loss(model, *batch))
    losses = torch.cat(losses).cpu()
    return torch.stack([losses[b::T_BINS].mean() for b in range(T_BINS)])


def validation_loss(model, dataset, prompts, precision=None):
    """`loss_by_timestep` on every clip of `dataset`, from fresh `validation_batches`."""
    batches = validation_batches(dataset, prompts, next(model.parameters()).device)
    return loss_by_timestep(model, batches, precision)


# --------------------------------------------------------------------------------------------------------
# Sampling


def predict(model, x, t, prompt, null, guidance):
    """The clip that the model predicts at timestep t (a number) -> (B, 3, T, H, W) float32. With guidance,
    the prompt and the null prompt go through the model as one batch."""
    B = len(x)
    if guidance == 1:
        return model(x, x.new_full((B,), t), *prompt).float()
    inputs = [torch.cat(pair) for pair in zip(prompt, null, strict=True)]  # each (2B, ...)
    clean = model(torch.cat([x, x]), x.new_full((2 * B,), t), *inputs).float()
    cond, uncond = clean.chunk(2)
    return uncond + guidance * (cond - uncond)


def like_prompt(null, prompt):
    """The null prompt (1, L', ...) of each encoder, repeated and padded to the shape of the prompt (B, L,
    ...)."""
    padded = []
    for short, full in zip(null, prompt, strict=True):
        out = torch.zeros_like(full)  # a mask is False there
        out[:, : short.shape[1]] = short
        padded.append(out)
    return padded


def solver_times(steps: int, shift: float) -> list[float]:
    """The timesteps at which the steps of the solver begin, and 1."""
    even = [LAST_STEP * i / max(1, steps - 1) for i in range(steps)]
    return [shifted(t, shift) for t in even] + [1.0]


def shifted(t: float, shift: float) -> float:
    """The timestep whose logit is that of t, less `shift`."""
    return t / (t + math.exp(shift) * (1 - t))


@torch.no_grad()
def solve(
    model, noise, prompt, null, steps=STEPS, guidance=GUIDANCE,
    guidance_interval=GUIDANCE_INTERVAL, method="heun", progress=None,
):  # fmt: skip
    """Follow the flow from noise to clips.

    noise (B, 3, T, H, W), standard normal; prompt: features (B, L, D) and mask (B, L) of each text encoder;
    null: the same for the null prompt, (1, L', D) with L' <= L; `guidance` acts at timesteps within
    `guidance_interval`; `method` is "heun" or "euler"; `progress` is called after every step -> clips (B, 3,
    T, H, W), about in [-1, 1]. Raises ValueError for an unknown method.
    """
    if method not in ("heun", "euler"):
        raise ValueError(f"no solver is called {method!r}; there are heun and euler")
    null = like_prompt(null, prompt)
    shift = shift_of(noise.shape)
    first, last = (shifted(t, shift) for t in guidance_interval)

    def velocity(x, t):
        scale = guidance if first <= t <= last else 1.0
        return (predict(model, x, t, prompt, null, scale) - x) / (1 - t)

    times = solver_times(steps, shift)
    x = noise
    for i in range(steps):
        t, t_next = times[i], times[i + 1]
        v = velocity(x, t)
        if method == "heun" and i < steps - 1:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
        if progress:
            progress()
    return x
