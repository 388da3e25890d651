"""Rectified flow: what a video model is trained to do.

Draw a straight line between noise and a clip, x_t = t x + (1 - t) noise, with t = 0 noise and t = 1 the clip
(rectified flow, arXiv 2209.03003). Ask the model for the clip x at the end of the line; the velocity it
implies is (x_predicted - x_t) / (1 - t), the true one is x - noise, and the loss is the squared difference of
the two, which is the squared error of the clip over (1 - t)^2 (JiT, arXiv 2511.13720: predict x, weigh as
velocity; 1 - t is not taken below 0.05). Times are logit-normal, sigmoid(N(-1, 0.65)): what a clip shows is
decided early, in noise. JiT takes N(-0.8, 0.8); in the batches of a small machine the rare late times, whose
loss weighs most, seem to drown what the early ones teach (README, *Choices that were measured*).

How a clip is made by following the velocity from noise is told in sample.py. Left out: other paths than the
straight line, other predictions than the clip, weights of the loss, and pairing of noise with clips.
"""

import torch

from sample import autocast

T_BINS = 8  # slices of the times, equally likely in training, for the validation loss


def flow_loss(model, x, t, noise, prompt):
    """The velocity loss of each clip. x (B, 3, T, H, W) in [-1, 1]; t (B,) in [0, 1); noise like x; prompt,
    the features (B, L, D) and mask (B, L) of each text encoder -> (B,) float32, each the mean over a clip. A
    model that predicts grey has about the variance of the data over (1 - t)^2."""
    s = t.view(-1, 1, 1, 1, 1)
    predicted = model(s * x + (1 - s) * noise, t, *prompt)
    return ((predicted.float() - x) / (1 - s).clamp_min(0.05)).square().mean((1, 2, 3, 4))


def time_of(normal):
    """Standard normal numbers -> logit-normal times in (0, 1): sigmoid(N(-1, 0.65))."""
    return torch.sigmoid(-1 + 0.65 * normal)


@torch.no_grad()
def validation_loss(model, world, prompts, precision=None):
    """The loss on every clip of `world` at fixed noise and at times drawn as in training -> (T_BINS,),
    means over equally likely slices of the times: which part of the way from noise to clip is hard. Of few
    clips each is taken several times. `precision` is the autocast type, None for float32."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    losses = []
    for rows in torch.arange(max(len(world), 8 * T_BINS)).split(64):
        x, captions = world.batch(rows % len(world))
        t = time_of(
            torch.special.ndtri((rows % T_BINS + torch.rand(len(rows), generator=generator)) / T_BINS)
        )
        noise = torch.randn(x.shape, generator=generator)
        x, t, noise, *prompt = (v.to(device) for v in (x, t, noise, *prompts.batch(captions)))
        with autocast(device, precision):
            losses.append(flow_loss(model, x, t, noise, prompt).cpu())
    losses = torch.cat(losses)
    return torch.stack([losses[b::T_BINS].mean() for b in range(T_BINS)])
