"""From one text encoder to another: a linear map, in closed form.

A model that reads through a small encoder is given an LLM (`--grow llm`, ModelGrow, arXiv 2412.18966, figure
2). Its new cross-attention is a copy of the one to the text, but what an LLM writes it cannot read: the same
words are other vectors. An embedding that begins at random has to be found by training, and some attributes
of a prompt were not found in 4,000 steps (README, *A language model reads the prompt*).

Both encoders say the same, though, of the same captions, so that most of one follows from the other by a
linear map y = W x + b. With it in front the embedding of the text serves the LLM too: `align` sets

    llm_embed(x)  =  text_embed(W x + b)

for a new branch, which then knows at once what the model has learned of the world's words. For W one needs to
know which vector y goes with which x, and two tokenizers cut a caption into other pieces. So, in turn:

    means    the mean of a caption's vectors x goes with the mean of its vectors y; fit W, b
    tokens   each x goes with the y of its caption that W x + b comes closest to; fit W, b; three times

(the iterative closest point of Besl and McKay, 1992, with a linear map in the place of a rigid one). Each fit
is a ridge regression, with X and Y the vectors of all pairs, less their means:

    W = Y^T X (X^T X + r)^-1      b = mean(y) - W mean(x)

How good the map is can be seen: `python align.py runs/base` puts the LLM in the place of the small encoder,
without a step of training, into a run that evaluate.py and sample.py take.

Left out: maps that are not linear, which training finds anyway, and weights of words.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from checkpoint import load_checkpoint, save_checkpoint
from data import ToyWorld
from dit import DiT, layer_norm
from grow import grow_state
from text_encoder import LAYERS, Prompts, encode

CAPTIONS, ROUNDS, RIDGE = 2048, 3, 0.01  # the last one relative to the mean variance of a channel


def fit(pairs):
    """Ridge regression on batches of x (n, C) and y (n, D) -> W (D, C) and b (D,), for y = W x + b."""
    count, x_mean, y_mean, gram, cross = 0, 0.0, 0.0, 0.0, 0.0
    for x, y in pairs:  # sums alone are kept
        count += len(x)
        x_mean, y_mean = x_mean + x.sum(0).double(), y_mean + y.sum(0).double()
        gram, cross = gram + (x.T @ x).double(), cross + (x.T @ y).double()
    x_mean, y_mean = x_mean / count, y_mean / count
    gram, cross = gram - count * x_mean.outer(x_mean), cross - count * x_mean.outer(y_mean)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-9) * torch.eye(len(gram))
    W = torch.linalg.solve(gram + ridge, cross).T
    return W.float(), (y_mean - W @ x_mean).float()


def translate(prompts, captions):
    """The map from the vectors of an LLM to those of a text encoder, by what both say of `captions`. prompts:
    the `Prompts` of text_encoder.py -> W (D, C) and b (D,), for vectors of mean 0 and variance 1."""

    def batches():
        for i in range(0, len(captions), 256):
            text, mask, llm, llm_mask = prompts.batch(captions[i : i + 256])  # (B, L, D) and (B, L', C)
            yield layer_norm(text.float()), mask, layer_norm(llm.float()), llm_mask

    def means(x, mask):
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def closest(text, mask, llm, llm_mask):
        far = torch.cdist(llm @ W.T + b, text).masked_fill(~mask[:, None], math.inf)  # (B, L', L)
        return text.gather(1, far.argmin(2, keepdim=True).expand(-1, -1, text.shape[-1]))[llm_mask]

    W, b = fit((means(llm, llm_mask), means(text, mask)) for text, mask, llm, llm_mask in batches())
    for _ in range(ROUNDS):
        W, b = fit((batch[2][batch[3]], closest(*batch)) for batch in batches())
    return W, b


@torch.no_grad()
def align(models: tuple[DiT, ...], prompts, captions: list[str]):
    """Let a silent LLM branch read as the branch to the text does, in place and in each of `models`, which
    stay the same functions. prompts: the `Prompts` of text_encoder.py that hold the `captions`, of which up
    to CAPTIONS are looked at."""
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))  # sets may alternate
    W, b = translate(prompts, [captions[i] for i in order[:CAPTIONS]])
    for model in models:
        old, up = model.text_embed.state_dict(), model.text_embed.up.weight
        mapped = {"up.weight": up @ W, "up.bias": old["up.bias"] + up @ b}
        model.llm_embed.load_state_dict(old | mapped)


@torch.no_grad()
def swap(model: DiT):
    """Let the LLM branch speak through the gates of the branch to the text, which falls silent; in place."""
    for block in model.blocks:
        for new, old in zip(block.adaln_llm.parameters(), block.adaln.parameters(), strict=True):
            gate = old.unflatten(0, (3, 3, -1))[1, 2]  # three branches, each (shift, scale, gate)
            new.unflatten(0, (3, -1))[2].copy_(gate)
            gate.zero_()


def main(argv=None):
    """Let a trained model read through an LLM without a step of training: `python align.py runs/base`."""
    parser = argparse.ArgumentParser(
        description="Put an LLM in the place of a model's text encoder, by a linear map and without training."
    )
    add = parser.add_argument
    add("checkpoint", help="run or checkpoint")
    add("--llm", default="smollm2", help="smollm2, a directory or a Hub id [smollm2]")
    add("--llm-features", default="last", choices=LAYERS, help="which of its layers [last]")
    add("--out", default="runs/swapped", help="run directory of what reads through the LLM [runs/swapped]")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise ValueError(f"{args.out} is there already: name another directory with --out")
    start = load_checkpoint(args.checkpoint)
    start.header.update(llm=args.llm, llm_features=args.llm_features)
    dim = encode([], args.llm, args.llm_features).dim
    grown = grow_state(start, "llm", llm_dim=dim)
    captions = ToyWorld("basic", CAPTIONS, words="varied", cache=False).captions
    align((grown.model, grown.ema), Prompts(captions, grown.header, dim), captions)
    for model in (grown.model, grown.ema):
        swap(model)
    grown.header["history"].append({"grow": "swap", "llm": args.llm, "changed": {}})
    save_checkpoint(Path(args.out) / "checkpoint", grown)
    print(f"written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
