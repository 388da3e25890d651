"""The linear map from an LLM to a text encoder: exact where one exists, and what the branch does with it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import align
from conftest import SMALL, random_inputs, random_model, tiny_llm
from dit import layer_norm
from grow import grow_llm, grow_state
from run import Checkpoint, history_tree, load_checkpoint, load_model, save_checkpoint
from text_encoder import Prompts


class WordPrompts:
    """In place of `Prompts`: a text is a list of word numbers. The text encoder gives a vector for each word,
    plus `context` times the mean of the caption. The LLM gives the vector of each word twice, with its
    channels in another order."""

    generator = torch.Generator().manual_seed(0)
    words = torch.randn(99, SMALL.text_dim, generator=generator)
    order = torch.randperm(SMALL.text_dim, generator=generator)

    def __init__(self, context=0.0):
        self.context, self.read = context, []

    def batch(self, texts):
        """As `Prompts.batch`."""
        self.read += texts
        numbers = [torch.tensor(text) for text in texts]
        lengths = torch.tensor([len(text) for text in texts])
        numbers = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True)  # (B, L)
        mask = torch.arange(numbers.shape[1]) < lengths[:, None]
        vectors = self.words[numbers] * mask.unsqueeze(-1)  # (B, L, D)
        mean = vectors.sum(1, keepdim=True) / lengths[:, None, None]
        text = (vectors + self.context * mean) * mask.unsqueeze(-1)
        llm = vectors[..., self.order].repeat_interleave(2, 1)  # (B, 2 L, D)
        return text, mask, llm, mask.repeat_interleave(2, 1)


@pytest.fixture
def captions():
    """3,000 captions of 3 to 7 words."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 99, rng.integers(3, 8)).tolist() for _ in range(3000)]


def distance(model, prompts, captions):
    """How far the LLM branch's embedding is from the text's, relative to its norm."""
    text, _, llm, llm_mask = prompts.batch(captions[:50])
    wanted = model.text_embed(layer_norm(text)).repeat_interleave(2, 1)[llm_mask]
    found = model.llm_embed(layer_norm(llm))[llm_mask]
    return ((found - wanted).norm() / wanted.norm()).item()


def test_fit_against_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(500, 6, generator=generator), torch.randn(500, 4, generator=generator)
    x = 3 * x + 1
    y = x @ torch.randn(6, 4, generator=generator) + 5 + 0.1 * noise
    with pytest.MonkeyPatch.context() as context:
        context.setattr(align, "RIDGE", 0)
        W, b = align.fit([(x[:100], y[:100]), (x[100:], y[100:])])
    ones = torch.cat([x, torch.ones(500, 1)], 1)
    solution = torch.linalg.lstsq(ones, y).solution  # (7, 4)
    assert torch.allclose(W, solution[:6].T, atol=1e-4) and torch.allclose(b, solution[6], atol=1e-3)
    W_ridge, _ = align.fit([(x, y)])
    assert (W_ridge.norm() / W.norm()).item() == pytest.approx(1 / (1 + align.RIDGE), abs=0.003)


def test_the_embedding_contains_the_map(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(SMALL.text_dim, 7, generator=generator)
    b = torch.randn(SMALL.text_dim, generator=generator)
    monkeypatch.setattr(align, "translate", lambda prompts, captions: (W, b))
    grown = grow_llm(random_model(), 7)
    align.align((grown,), WordPrompts(), [[1]])
    x = torch.randn(5, 7, generator=generator)
    assert torch.allclose(grown.llm_embed(x), grown.text_embed(x @ W.T + b), atol=1e-5)


def test_an_aligned_branch_reads_the_llm_as_it_reads_the_text(captions):
    model = random_model()
    grown = grow_llm(model, SMALL.text_dim)
    assert distance(grown, WordPrompts(), captions) > 0.5
    align.align((grown,), WordPrompts(), captions)
    assert distance(grown, WordPrompts(), captions) < 0.02
    x, t, *_ = random_inputs(batch=1)
    text, mask, *llm = WordPrompts().batch(captions[:1])
    assert torch.equal(grown(x, t, text, mask, *llm), model(x, t, text, mask)), "the gates are still zero"


def test_tokens_say_more_than_means(captions, monkeypatch):
    """The mean of a caption holds more of its context than a token does."""
    grown = grow_llm(random_model(), SMALL.text_dim)
    align.align((grown,), WordPrompts(1), captions)
    by_tokens = distance(grown, WordPrompts(1), captions)
    monkeypatch.setattr(align, "ROUNDS", 0)
    align.align((grown,), WordPrompts(1), captions)
    assert by_tokens < 0.8 * distance(grown, WordPrompts(1), captions)


def test_one_caption_is_enough(captions):
    grown = grow_llm(random_model(), SMALL.text_dim)
    align.align((grown,), WordPrompts(), captions[:1])
    assert all(parameter.isfinite().all() for parameter in grown.parameters())
    W, b = align.fit([(torch.ones(3, 4), torch.full((3, 2), 5.0))])  # no variance at all
    assert W.isfinite().all() and torch.allclose(W @ torch.ones(4) + b, torch.tensor(5.0))


def test_both_halves_of_an_alternating_set_are_read():
    prompts = WordPrompts()
    align.align((), prompts, [[1, 2], [3, 4, 5]] * align.CAPTIONS)
    lengths = [len(text) for text in prompts.read]
    assert len(lengths) == align.CAPTIONS * (1 + align.ROUNDS)
    assert min(lengths.count(2), lengths.count(3)) > 0.4 * len(lengths)


@pytest.fixture
def base(tmp_path, encoder_name):
    """A run with random weights that reads with a tiny encoder of 16 channels."""
    model = random_model(replace(SMALL, text_dim=16))
    metadata = {"text_encoder": encoder_name, "history": [], "flops": 0, "fps": 8, "new": []}
    checkpoint = Checkpoint(model, copy.deepcopy(model), {}, metadata, {})
    save_checkpoint(tmp_path / "base" / "checkpoint", checkpoint)
    return tmp_path / "base"


def test_the_command_replaces_the_text_encoder(tmp_path, base, monkeypatch, capsys):
    monkeypatch.setattr(align, "CAPTIONS", 64)
    llm, out = tiny_llm(tmp_path / "llm"), tmp_path / "swapped"
    align.main([str(base), "--llm", llm, "--llm-features", "mean", "--out", str(out)])
    assert f"written to {out}" in capsys.readouterr().out
    model, metadata = load_model(out)
    assert (model.config.llm_dim, metadata["llm"], metadata["llm_features"]) == (16, llm, "mean")
    assert history_tree(metadata["history"]).splitlines()[-1].strip() == f"└─ swap: llm {llm}"

    prompts = Prompts(["a red cat", "surfing"], metadata, 16)
    a, b = prompts.rows(["a red cat"]), prompts.rows(["surfing"])
    x, t, *_ = random_inputs(batch=1)
    red_cat = model(x, t, *prompts.gather(a))
    assert torch.equal(model(x, t, *prompts.gather(b, a)), red_cat), "the text encoder is still read"
    assert not torch.allclose(model(x, t, *prompts.gather(a, b)), red_cat), "the LLM is not read"


def test_the_command_refuses(tmp_path, base, monkeypatch):
    monkeypatch.setattr(align, "CAPTIONS", 64)
    llm, out = tiny_llm(tmp_path / "llm"), tmp_path / "swapped"
    align.main([str(base), "--llm", llm, "--out", str(out)])
    with pytest.raises(ValueError, match="swapped is there already"):
        align.main([str(base), "--llm", llm, "--out", str(out)])
    with pytest.raises(ValueError, match="an LLM branch already"):
        align.main([str(out), "--llm", llm, "--out", str(tmp_path / "twice")])
    mine = load_checkpoint(base)
    event = {"train": "my_clips", "captions": "detailed", "steps": 1, "tune": "all", "seed": 0}
    mine.metadata["history"].append(event)
    save_checkpoint(tmp_path / "mine" / "checkpoint", mine)
    with pytest.raises(
        ValueError, match="mine was trained on my_clips: the map is made from captions of the"
    ):
        align.main([str(tmp_path / "mine"), "--llm", llm, "--out", str(tmp_path / "other")])


def test_a_swapped_model_takes_adapters(tmp_path, base, monkeypatch):
    """Its new gates are open, unlike those of a model that has grown by an LLM and was not trained."""
    monkeypatch.setattr(align, "CAPTIONS", 64)
    swapped = align.swapped(base, tiny_llm(tmp_path / "llm"), "last")
    assert grow_state(swapped, "lora", rank=2).model.config.lora_rank == 2
    deeper = grow_state(swapped, "depth", add=1)
    with pytest.raises(ValueError, match="adapters would freeze"):
        grow_state(deeper, "lora", rank=2)
