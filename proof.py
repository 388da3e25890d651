"""The check of a growth: how large two models are, and how much their outputs differ.

grow.py computes it before it writes a grown checkpoint, and writes none if a growth that should be exact is
not. Random clips, timesteps and prompts are enough: a new branch that is not zero changes every output. The
models are those of the checkpoint, so the proof does not rest on tests with other weights.

Left out: float64, and a table of all operators. tests/test_grow.py checks each of them in both precisions, on
random models without a zero weight.
"""

import torch

from cost import count_flops
from dit import DiT


@torch.no_grad()
def largest_difference(base: DiT, grown: DiT) -> tuple[float, float]:
    """-> the largest |grown - base| and |base| over all outputs, on two random clips of the base's shape with
    random timesteps and prompts of 4 and 7 tokens. If patches became larger, the clips and the outputs of the
    base are enlarged to fit."""
    c = base.config
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, c.frames, c.size, c.size, generator=g)
    t = torch.rand(2, generator=g)
    text = torch.randn(2, 7, c.text_dim, generator=g)
    llm = torch.randn(2, 7, grown.config.llm_dim, generator=g)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    factor = grown.config.patch_size // c.patch_size

    def enlarge(clips):
        return clips.repeat_interleave(factor, -1).repeat_interleave(factor, -2)

    outputs = []
    for model, clips in ((base, x), (grown, enlarge(x))):
        prompt = (text, mask, llm, mask) if model.config.llm_dim else (text, mask)
        outputs.append(model(clips, t, *prompt))
    difference = (outputs[1] - enlarge(outputs[0])).abs().max()
    return difference.item(), outputs[0].abs().max().item()


def report(base: DiT, grown: DiT, new: list[str], exact: bool) -> list[str]:
    """Lines: how large both models are, which blocks are `new`, and how much the outputs differ. Raises
    ValueError if they differ at all although the growth is `exact`."""
    lines = []
    for title, model in (("base", base), ("grown", grown)):
        size = f"{model.config.depth} blocks of width {model.config.width}"
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        lengths = (16, 64) if model.config.llm_dim else (16,)  # tokens of text, and of an LLM
        flops = count_flops(model, lengths, backward=False) / 1e9
        lines.append(f"{title:7}{size:24}{parameters:10.2f} M parameters{flops:10.2f} GFLOPs forward")
    if grown.config.depth > base.config.depth:
        numbers = range(grown.config.depth)
        blocks = [str(i) for i in numbers if f"blocks.{i}.adaln.weight" in new]
        lines.append(f"new blocks: {' '.join(blocks)}")
    difference, largest = largest_difference(base, grown)
    if exact and difference != 0:
        raise ValueError(f"the grown model must compute the same, but differs by {difference}: not written")
    verdict = "another function"
    if difference == 0:
        verdict = "the same bits"
    elif difference < 1e-4 * largest:
        verdict = "the same up to rounding"
    lines.append(f"largest difference in float32: {difference:.2g} (largest output {largest:.2g}): {verdict}")
    return lines
