"""From one text encoder to another: a linear map, in closed form.

A model that reads with a small encoder gets an LLM (`--grow llm`, ModelGrow, arXiv 2412.18966, figure 2). Its
new cross-attention is a copy of the one to the text, but it cannot read the LLM's features: the LLM encodes
the same words in other vectors. A randomly initialized embedding would have to be trained, and some
attributes of a prompt were not learned in 4,000 steps (docs/language.md).

But both encoders read the same captions. So most of the features of one follow from those of the other by a
linear map y = W x + b. With this map in front, the embedding of the text also serves the LLM. `align` sets

    llm_embed(x)  =  text_embed(W x + b)

for a new branch, which then knows at once what the model has learned about the words of its captions. To fit
W one must know which vector y belongs to which x, and two tokenizers cut a caption into different tokens. So
there are two kinds of pairs:

    means    the mean of a caption's vectors x, with the mean of its vectors y: fit W, b
    tokens   each x, with the y of its caption that is closest to W x + b: fit W, b; three times

(the iterative closest point method of Besl and McKay, 1992, with a linear map instead of a rigid one). Each
fit is a ridge regression. X and Y hold the vectors of all pairs, minus their means:

    W = Y^T X (X^T X + r)^-1      b = mean(y) - W mean(x)

You can see how good the map is: `python align.py runs/base` replaces the small encoder of a run by the LLM,
without a step of training. sample.py and `lab.evaluate` take the new run as any other.

Left out: nonlinear maps, which training finds anyway, and weights of words.
"""

import argparse
import math
from pathlib import Path

import torch

from dit import DiT, layer_norm
from machine import run_command
from text_encoder import LLM_LAYERS, Prompts, cached_features, located

CAPTIONS = 2048  # to fit on, at most
BATCH = 256  # captions at a time
ROUNDS = 3  # fits with the closest tokens
RIDGE = 0.01  # relative to the mean variance of a channel of x


def fit(pairs):
    """Ridge regression on batches of x (n, C) and y (n, D) -> W (D, C) and b (D,), for y = W x + b. Only sums
    are kept, in float64 on the CPU."""
    count, x_sum, y_sum, gram, cross = 0, 0.0, 0.0, 0.0, 0.0
    for x, y in pairs:
        count += len(x)
        x_sum = x_sum + x.sum(0).cpu().double()  # (C,)
        y_sum = y_sum + y.sum(0).cpu().double()  # (D,)
        gram = gram + (x.T @ x).cpu().double()  # (C, C)
        cross = cross + (x.T @ y).cpu().double()  # (C, D)
    x_mean, y_mean = x_sum / count, y_sum / count
    gram = gram - count * x_mean.outer(x_mean)
    cross = cross - count * x_mean.outer(y_mean)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-9) * torch.eye(len(gram))
    W = torch.linalg.solve(gram + ridge, cross).T
    b = y_mean - W @ x_mean
    return W.to(x), b.to(x)


def normalized_batches(prompts, captions):
    """-> text (B, L, D), its mask (B, L), llm (B, L', C), its mask (B, L') of all captions; vectors have mean
    0 and variance 1, as the model's embeddings see them."""
    for start in range(0, len(captions), BATCH):
        text, mask, llm, llm_mask = prompts.batch(captions[start : start + BATCH])
        yield layer_norm(text.float()), mask, layer_norm(llm.float()), llm_mask


def pairs_of_means(prompts, captions):
    """-> batches of x (B, C) and y (B, D): the means of the vectors of a caption."""
    for text, mask, llm, llm_mask in normalized_batches(prompts, captions):
        x = (llm * llm_mask.unsqueeze(-1)).sum(1) / llm_mask.sum(1, keepdim=True)
        y = (text * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        yield x, y


def pairs_of_tokens(prompts, captions, W, b):
    """-> batches of x (n, C) and y (n, D): each vector of the LLM with the vector of the text encoder that is
    closest to W x + b among those of the same caption."""
    for text, mask, llm, llm_mask in normalized_batches(prompts, captions):
        distance = torch.cdist(llm @ W.T + b, text)  # (B, L', L)
        distance = distance.masked_fill(~mask[:, None], math.inf)
        closest = distance.argmin(2, keepdim=True).expand(-1, -1, text.shape[-1])  # (B, L', D)
        yield llm[llm_mask], text.gather(1, closest)[llm_mask]


def translate(prompts, captions):
    """The map from the features of an LLM to those of a text encoder, fitted on `captions`. prompts: the
    `Prompts` of text_encoder.py -> W (D, C) and b (D,), for vectors of mean 0 and variance 1."""
    W, b = fit(pairs_of_means(prompts, captions))
    for _ in range(ROUNDS):
        W, b = fit(pairs_of_tokens(prompts, captions, W, b))
    return W, b


@torch.no_grad()
def align(models: tuple[DiT, ...], prompts, captions: list[str]):
    """Initialize the zero-gated LLM branch of each of `models`, in place: its embedding is that of the text
    after the linear map. Their outputs do not change. prompts: the `Prompts` of text_encoder.py that hold
    `captions`, of which at most CAPTIONS are used."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(captions), generator=generator)  # short and detailed ones may alternate
    W, b = translate(prompts, [captions[i] for i in order[:CAPTIONS]])
    for model in models:
        state = model.text_embed.state_dict()  # up and down, each with weight and bias
        up = state["up.weight"]
        state["up.bias"] = state["up.bias"] + up @ b.to(up)
        state["up.weight"] = up @ W.to(up)
        model.llm_embed.load_state_dict(state)


@torch.no_grad()
def swap(model: DiT):
    """Give the LLM branch the gates of the branch to the text, whose gates become zero; in place."""
    for block in model.blocks:
        for text_side, llm_side in (
            (block.adaln.weight, block.adaln_llm.weight),
            (block.adaln.bias, block.adaln_llm.bias),
        ):
            text_gate = text_side.chunk(9)[5]  # (shift, scale, gate) of self-attention, text and MLP
            llm_gate = llm_side.chunk(3)[2]
            llm_gate.copy_(text_gate)
            text_gate.zero_()


def swapped(path, llm: str, layers: str):
    """The checkpoint of a run -> a checkpoint that reads with an LLM instead of its text encoder."""
    from data import SETS, caption, make_scenes
    from grow import grow_state
    from run import last_training, load_checkpoint

    checkpoint = load_checkpoint(path)
    training = last_training(checkpoint.metadata["history"])
    if training and training["train"] not in SETS:
        what = f"{path} was trained on {training['train']}"
        raise ValueError(f"{what}: the map is made from captions of the toy world")
    llm = located(llm)
    checkpoint.metadata.update(llm=llm, llm_features=layers)
    llm_dim = cached_features([], llm, layers).dim
    grown = grow_state(checkpoint, "llm", llm_dim=llm_dim)
    captions = [caption(scene, "short", "varied", 0.1) for scene in make_scenes("basic", CAPTIONS)]
    align((grown.model, grown.ema), Prompts(captions, grown.metadata, llm_dim), captions)
    swap(grown.model)
    swap(grown.ema)
    grown.metadata["history"].append({"grow": "swap", "llm": llm, "changed": {}})
    return grown


def main(argv=None):
    """Let a trained model read with an LLM, without a step of training: `python align.py runs/base`."""
    from run import save_checkpoint

    parser = argparse.ArgumentParser(
        description="Replace a model's text encoder by an LLM, with a linear map and without training."
    )
    add = parser.add_argument
    add("checkpoint", help="run or checkpoint")
    add("--llm", default="smollm2", help="smollm2 (default), a directory or a Hub id")
    add("--llm-features", default="last", choices=LLM_LAYERS, help="which of its layers (last)")
    add("--out", default="runs/swapped", help="run directory for the result (runs/swapped)")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise ValueError(f"{args.out} is there already: name another directory with --out")
    result = swapped(args.checkpoint, args.llm, args.llm_features)
    save_checkpoint(Path(args.out) / "checkpoint", result)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_command(main)
