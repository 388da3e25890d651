"""lab/blocks.py: blocks that do nothing, blocks that turn by a known angle, pruning, and the report."""

import json

import pytest
import torch
import torch.nn as nn

from conftest import SMALL, brief, checkpoint_of, random_inputs, random_model, train_without_pictures
from grow import grow_depth, grow_state
from lab import blocks, report, study
from run import load_checkpoint, load_model, save_checkpoint


def random_batches(config=SMALL):
    """Two batches of different sizes, as flow.validation_batches gives them."""
    batches = []
    for seed, size in ((0, 64), (1, 32)):
        x, t, text, mask = random_inputs(config, size, seed=seed)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        batches.append((x, t, noise, (text, mask)))
    return batches


def test_blocks_with_zero_gates_do_nothing():
    """Importance and removal cost of such blocks are 0, not about 0; those of the others are not."""
    base = random_model()
    grown = grow_depth(base, add=2, where="insert")
    batches = random_batches()
    metadata = {"history": [], "new": [], "flops": 7}
    before, after = (blocks.measure(model, metadata, batches) for model in (base, grown))
    new = [2, 4]  # 0 1 1' 2 2': groups of two blocks and of one
    for name in ("importance", "cost"):
        zero = [i for i, value in enumerate(after[name]) if value == 0]
        assert zero == new and 0 not in before[name]
        assert [value for value in after[name] if value != 0] == before[name]
    assert after["loss"] == before["loss"]


class Turn(nn.Module):
    """A block that turns pairs of channels by an angle and makes them longer."""

    def __init__(self, angle):
        super().__init__()
        c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        self.matrix = 3 * torch.stack([torch.stack([c, -s]), torch.stack([s, c])])

    def forward(self, x, *_):
        return (x.unflatten(-1, (-1, 2)) @ self.matrix).flatten(-2)


def test_importance_of_a_rotation():
    angles = (0.0, 0.5, 3.0)
    model = random_model()
    model.blocks = nn.ModuleList(Turn(angle) for angle in angles)
    found = blocks.importance(model, random_batches())
    assert found == pytest.approx([1 - torch.tensor(angle).cos().item() for angle in angles], abs=1e-6)
    assert not any(block._forward_hooks for block in model.blocks)


def test_importance_weighs_clips_not_batches():
    """Against the cosines of all tokens, collected one by one."""
    model, batches = random_model(), random_batches()
    cosines = [[] for _ in model.blocks]
    for i, block in enumerate(model.blocks):
        cosine = nn.CosineSimilarity(dim=-1)
        block.register_forward_hook(lambda _, x, y, i=i, f=cosine: cosines[i].append(f(x[0], y).flatten()))
    found = blocks.importance(model, batches)
    assert found == pytest.approx([1 - torch.cat(values).mean().item() for values in cosines], abs=1e-6)


def test_removal_costs_are_those_of_skipped_blocks():
    """Against the model itself, in which the block gives back its input."""
    model, batches = random_model(), random_batches()
    loss = blocks.loss_of(model, batches)
    costs = blocks.removal_costs(model, batches, loss)
    for i, cost in enumerate(costs):
        hook = model.blocks[i].register_forward_hook(lambda _, inputs, output: inputs[0])
        assert cost == blocks.loss_of(model, batches) - loss != 0
        hook.remove()


def test_a_model_without_idle_blocks_is_the_same_function():
    base = random_model()
    grown = grow_depth(base, add=3, where="suffix")
    batches = random_batches()
    metadata = {"history": [], "new": [], "flops": 7}
    result = blocks.measure(grown, metadata, batches)
    pruned, after = blocks.prune(grown, metadata, result, 3)
    event = {"grow": "prune", "changed": {"depth": [6, 3]}, "removed": [3, 4, 5]}
    assert after == {"history": [event], "new": [], "flops": 7} and pruned.config == base.config
    for name, weight in base.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], weight)
    with pytest.raises(ValueError, match="has 3 blocks: one must stay"):
        blocks.remove_blocks(base, {0, 1, 2})


def test_what_the_history_says():
    history = [{"train": "rich", "seed": 4}]
    metadata = {"history": history, "new": []}
    assert blocks.growth_of(metadata, 2) == {"when": "before", "where": "", "new": [False] * 2, "seed": 4}
    grown = grow_state(checkpoint_of(random_model(), history=history), "depth", add=3, where="suffix")
    found = blocks.growth_of(grown.metadata, 6)
    assert found == {"when": "at growth", "where": "suffix", "new": [False] * 3 + [True] * 3, "seed": 4}
    trained = {**grown.metadata, "history": [*grown.metadata["history"], {"train": "rich", "seed": 5}]}
    assert blocks.growth_of(trained, 6) == {**found, "when": "after", "seed": 5}
    again = grow_state(checkpoint_of(random_model(), history=trained["history"]), "llm", llm_dim=8)
    assert blocks.growth_of(again.metadata, 6)["new"] == found["new"]


@pytest.fixture
def small_world(monkeypatch):
    """Few clips, so that a model of a test is measured fast."""
    monkeypatch.setattr(blocks, "CLIPS", 8)
    monkeypatch.setattr(blocks, "find_revision", lambda: "abc")


def test_the_command_and_the_report(tmp_path, encoder_name, small_world, capsys):
    """Before growth, at growth and after it; the figure; pruning, and a checkpoint that can be used."""
    base = train_without_pictures(brief(tmp_path / "base", encoder_name, "--data rich --depth 2"))
    results = tmp_path / "results"
    blocks.main([str(base), "--out", f"{results}/blocks/before.json"])
    for where in ("insert", "suffix"):
        grown = grow_state(load_checkpoint(base), "depth", add=2, where=where)
        save_checkpoint(tmp_path / where / "checkpoint", grown)
        blocks.main([str(tmp_path / where), "--out", f"{results}/blocks/{where}.json"])
    insert = json.loads((results / "blocks" / "insert.json").read_text())
    before = json.loads((results / "blocks" / "before.json").read_text())
    assert insert["importance"][::2] == before["importance"] and insert["importance"][1::2] == [0, 0]
    assert insert["cost"][1::2] == [0, 0] and insert["loss"] == before["loss"]
    assert insert["new"] == [False, True] * 2 and insert["revision"] == "abc"
    text = report.write_report(results, study.PARTS)
    assert f"| insert, at growth | 20 | {insert['loss']:.4f} |" in text and "| 0.0000 |" in text
    pictures = (results / "blocks.png").read_bytes()
    assert report.write_report(results, study.PARTS) == text
    assert (results / "blocks.png").read_bytes() == pictures

    capsys.readouterr()
    out = tmp_path / "pruned"
    file = results / "blocks" / "insert.json"
    blocks.main([str(tmp_path / "insert"), "--prune", "2", "--out-run", str(out), "--out", str(file)])
    assert json.loads(file.read_text()) == insert | {"pruned": {"removed": [1, 3], "loss": before["loss"]}}
    lines = capsys.readouterr().out
    assert f"without blocks 1, 3: loss {before['loss']:.4f} -> {before['loss']:.4f}" in lines
    pruned, metadata = load_model(out)
    whole, _ = load_model(base)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), whole.parameters(), strict=True))
    assert metadata["history"][-1]["removed"] == [1, 3]
    with pytest.raises(ValueError, match="is there already"):
        blocks.main([str(base), "--prune", "1", "--out-run", str(out)])
    with pytest.raises(ValueError, match="is for --prune"):
        blocks.main([str(base), "--out-run", "x"])
    with pytest.raises(ValueError, match="must be at least 1"):
        blocks.main([str(base), "--prune", "0"])


def made_up(where, when, seed, cost):
    """A result of two blocks, of which the second is new after growth."""
    new = [False] if when == "before" else [False, True]
    numbers = {"new": new, "importance": [0.5, 0.01][: len(new)], "cost": [0.2, cost][: len(new)]}
    history = [{"train": "rich", "steps": 30}] + ([{"train": "rich", "steps": 40}] if when == "after" else [])
    result = {"where": where, "when": when, "seed": seed, "loss": 0.3, "history": history, **numbers}
    return result | {"revision": "abc", "machine": "m"}


def test_means_and_verdict_of_the_report(tmp_path):
    (tmp_path / "blocks").mkdir()
    for seed in range(3):
        for where, cost in (("insert", 0.05), ("suffix", 0.01)):
            for kind in (("", "before"), (where, "at growth"), (where, "after")):
                result = made_up(*kind, seed, cost + 0.001 * seed)
                name = f"{'-'.join(kind)}-{seed}.json"
                (tmp_path / "blocks" / name).write_text(json.dumps(result))
    text = report.write_report(tmp_path, study.PARTS)
    row = "| insert, after | 30 + 40 | 0.3000 ± 0.0000 | 0.5000 ± 0.0000 | 0.0100 ± 0.0000 |"
    assert row + " 0.2000 ± 0.0000 | 0.0510 ± 0.0010 |" in text
    assert "| before | 30 | 0.3000 ± 0.0000 | 0.5000 ± 0.0000 |  | 0.2000 ± 0.0000 |  |" in text
    assert "is higher with insert than with suffix: 0.0400 ± 0.0000 (holds)." in text
    assert "Without the least important blocks" not in text
    for seed, removed in enumerate(([1], [0], [1])):
        file = tmp_path / "blocks" / f"suffix-after-{seed}.json"
        pruned = {"removed": removed, "loss": 0.31 + 0.01 * seed}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pruned": pruned}))
    text = report.write_report(tmp_path, study.PARTS)
    assert "| suffix, after | 1 | 1, 0, 1 | 0.0200 ± 0.0100 |" in text
    for file in (tmp_path / "blocks").glob("*after*"):
        file.unlink()
    assert "higher with insert" not in report.write_report(tmp_path, study.PARTS)
