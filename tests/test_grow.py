"""Growth: where blocks go, random operators on random models, the metadata of a training state, the command.

That each operator changes nothing, that what is new learns, and that moments grow as gradients do, is in
test_all.py. The command is tested by what it prints, what it writes, and what it refuses.
"""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import grow
from conftest import SMALL, call, checkpoint_of, gradients, random_inputs, random_model, randomize
from run import Checkpoint, history_tree, load_checkpoint, load_model, save_checkpoint

BETAS = (0.9, 0.95)  # of train.py


def grown_by(model, steps):
    """The model after the growths `steps`."""
    for operator, options in steps:
        model = grow.OPERATORS[operator](model, **options)
    return model


def grown_state_by(checkpoint, steps):
    """The checkpoint after the growths `steps`."""
    for operator, options in steps:
        checkpoint = grow.grow_state(checkpoint, operator, **options)
    return checkpoint


# --------------------------------------------------------------------------------------------------------
# Where new blocks go


def positions(plan):
    """-> blocks of the base, counted from 1, copies with a minus sign."""
    return [-(i + 1) if is_copy else i + 1 for i, is_copy in plan]


@pytest.mark.parametrize(
    "depth, add, group, where, expected",
    [
        (4, 4, 1, "insert", [1, -1, 2, -2, 3, -3, 4, -4]),
        (4, 2, 2, "insert", [1, 2, -2, 3, 4, -4]),
        (4, 1, 4, "insert", [1, 2, 3, 4, -4]),
        (6, 4, 3, "insert", [1, 2, 3, -3, -3, 4, 5, 6, -6, -6]),
        (7, 2, 3, "insert", [1, 2, 3, 4, -4, 5, 6, 7, -7]),  # 7 = 4 + 3
        (5, 2, 3, "insert", [1, 2, 3, 4, 5, -5, -5]),  # one group, as 5 < 2 * 3
        (4, 6, None, "insert", [1, -1, -1, 2, -2, -2, 3, -3, 4, -4]),  # 6 = 2 + 2 + 1 + 1
        (4, 3, None, "insert", [1, 2, -2, 3, -3, 4, -4]),
        (2, 5, None, "insert", [1, -1, -1, -1, 2, -2, -2]),
        (3, 2, None, "prefix", [-1, -1, 1, 2, 3]),
        (3, 2, None, "suffix", [1, 2, 3, -3, -3]),
    ],
)
def test_where_new_blocks_go(depth, add, group, where, expected):
    assert positions(grow.stacking_plan(depth, add, group, where)) == expected


def test_insert_agrees_with_llama_pro():
    """Its rule: a copy after every N / P blocks. Its own model has 32 blocks and 8 new ones."""
    new = [i for i, (_, is_copy) in enumerate(grow.stacking_plan(32, 8)) if is_copy]
    assert new == [4, 9, 14, 19, 24, 29, 34, 39]
    for depth, add in ((4, 1), (4, 2), (6, 3), (12, 4), (24, 24), (30, 5)):
        expected = []
        for i in range(1, depth + 1):
            expected += [i, -i] if i % (depth // add) == 0 else [i]
        assert positions(grow.stacking_plan(depth, add)) == expected
        assert positions(grow.stacking_plan(depth, add, depth // add)) == expected


@pytest.mark.parametrize("where", grow.WHERE)
def test_every_block_continues_the_block_that_the_plan_names(where):
    base = random_model()
    plan = grow.stacking_plan(3, 4, None, where)
    grown = grow.grow_depth(base, 4, where=where)
    sources = grow.source_names(base, grown, plan)
    assert sorted(sources.values()) == sorted(base.state_dict())  # each old parameter goes on once
    assert all(torch.equal(grown.state_dict()[a], base.state_dict()[b]) for a, b in sources.items())
    for j, (i, is_copy) in enumerate(plan):
        copied, source = grown.blocks[j], base.blocks[i]
        assert torch.equal(copied.attn.qkv.weight, source.attn.qkv.weight)
        assert torch.equal(copied.adaln.weight, source.adaln.weight) != is_copy
        assert (f"blocks.{j}.mlp.up.weight" in sources) != is_copy


# --------------------------------------------------------------------------------------------------------
# Growth changes nothing


def random_config(rng):
    """-> a small random config, every other one with an LLM branch."""
    heads = int(rng.integers(1, 4))
    return replace(
        SMALL,
        heads=heads,
        width=2 * heads * int(rng.integers(2, 9)),
        depth=int(rng.integers(1, 4)),
        mlp_ratio=int(rng.integers(1, 4)),
        text_dim=int(rng.integers(3, 30)),
        llm_dim=7 * int(rng.integers(0, 2)),
    )


def random_growth(rng, config):
    """-> a random operator that fits `config`, and its options."""
    depth = int(rng.integers(1, 4))
    group = int(rng.integers(1, config.depth + 1))
    ways = [
        ("depth", {"add": depth, "where": str(rng.choice(grow.WHERE))}),
        ("depth", {"add": config.depth // group * depth, "group": group}),
        ("width", {"factor": depth + 1}),
        ("mlp", {"factor": depth + 1}),
        ("resolution", {"frames": config.frames * 2}),
        ("lora", {"rank": depth}),
    ]
    if not config.llm_dim:
        ways.append(("llm", {"llm_dim": 7}))
    operator, options = ways[rng.integers(len(ways))]
    if operator == "depth":
        options["zero"] = str(rng.choice(["gate", "proj", "both"]))
    return operator, options


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_growths_of_any_model_change_nothing(dtype, tolerance):
    """Random operators on random models with random inputs, and growth of what has grown already."""
    rng = np.random.default_rng(0)
    used = set()
    for trial in range(14):
        config = random_config(rng)
        model = base = random_model(config, trial, dtype)
        before = copy.deepcopy(base.state_dict())
        batch, length = int(rng.integers(1, 4)), int(rng.integers(1, 8))
        inputs = random_inputs(config, batch, length, trial, dtype)
        truth, exact = call(base, inputs), True
        assert truth.std() > 0.1 and truth.dtype == dtype
        while not model.config.lora_rank and model.config.depth < 9 and model.config.width <= 100:
            operator, options = random_growth(rng, model.config)
            model = grow.OPERATORS[operator](model, **options)
            used.add(operator)
            exact = exact and operator in grow.EXACT
            out = call(model, inputs)
            assert torch.equal(out, truth) if exact else (out - truth).abs().max() < tolerance, operator
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert used == grow.OPERATORS.keys() - {"merge", "patch"}  # which takes other inputs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_adapters_compute_the_same(dtype, tolerance):
    adapted = randomize(grow.add_lora(random_model(), 3)).to(dtype)
    inputs = random_inputs(dtype=dtype)
    merged = grow.merge_lora(adapted)
    assert merged.config == SMALL and merged.state_dict().keys() == random_model().state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert (merged(*inputs) - adapted(*inputs)).abs().max() < tolerance
    plain = adapted.state_dict()
    plain = {name: plain[name] for name in merged.state_dict()}
    merged.load_state_dict(plain)  # without the adapters it is another function
    assert (merged(*inputs) - adapted(*inputs)).abs().max() > 0.1


def test_adapters_alone_are_trained():
    adapted = grow.add_lora(random_model(), 3)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name in adapted.state_dict() if "lora_" in name}
    assert len(trained) == 2 * 7 * SMALL.depth  # two matrices beside seven maps of a block


def corner_of_both(model, x, t, text, mask):
    """-> the output on large clips, cut to the corner of the old shape; and that on the cut clips."""
    corner = x[:, :, :4, :16, :16]
    return model(x, t, text, mask)[:, :, :4, :16, :16], model(corner, t, text, mask)


def test_larger_clips():
    """Every map but self-attention sees a single token, and gives the same at the same position."""
    base = random_model(dtype=torch.float64)
    grown = grow.grow_resolution(base, frames=8, size=32)
    assert (grown.config.frames, grown.config.size) == (8, 32)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), grown.parameters(), strict=True))
    x, t, text, mask = random_inputs(grown.config, dtype=torch.float64)
    corner = x[:, :, :4, :16, :16]
    assert torch.equal(grown(corner, t, text, mask), base(corner, t, text, mask))

    assert not torch.allclose(*corner_of_both(grown, x, t, text, mask), atol=0.01)
    for block in grown.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    torch.testing.assert_close(*corner_of_both(grown, x, t, text, mask), rtol=0, atol=1e-12)


def test_larger_patches_are_new_to_the_optimizer():
    """The moments of a map that has other rows or columns now would be those of other pixels."""
    base = random_model()
    state = {name: {"step": torch.tensor(4.0)} for name in base.state_dict()}
    for entry, parameter in zip(state.values(), base.parameters(), strict=True):
        entry |= {"exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach() ** 2}
    grown = grow.grow_state(checkpoint_of(base, state), "patch")
    assert set(grown.metadata["new"]) == {"patch_embed.weight", "final.weight", "final.bias"}
    assert grown.optimizer_state.keys() == base.state_dict().keys() - set(grown.metadata["new"])
    assert grown.metadata["history"][-1]["changed"] == {"size": [16, 32], "patch_size": [4, 8]}


def test_growth_leaves_random_numbers_and_mode_alone():
    """Growth draws from generators of its own, keeps train or eval mode, and repeats itself exactly."""
    base = random_model().eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for operator, options in (("width", {}), ("llm", {"llm_dim": 7}), ("lora", {"rank": 2})):
        one, two = (grow.OPERATORS[operator](base, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not one.training and grow.OPERATORS[operator](base.train(), **options).training
        base.eval()
    assert torch.equal(torch.rand(3), expected)
    other = grow.grow_llm(base, 7, seed=1)
    assert not torch.equal(other.llm_embed.up.weight, grow.grow_llm(base, 7).llm_embed.up.weight)


def test_the_llm_branch_copies_the_text_branch():
    """Weights, shift and scale of the cross-attention to the text; the gate is zero."""
    block = grow.grow_llm(random_model(), 7).blocks[1]
    for name, weight in block.cross.state_dict().items():
        assert torch.equal(block.cross_llm.state_dict()[name], weight), name
    for name, weight in block.adaln.state_dict().items():
        of_text = weight.unflatten(0, (3, 3, -1))[1]  # branches attn, cross, mlp; each (shift, scale, gate)
        of_llm = block.adaln_llm.state_dict()[name].unflatten(0, (3, -1))
        assert torch.equal(of_llm[:2], of_text[:2]) and (of_llm[2] == 0).all() and of_text[2].abs().min() > 0


# --------------------------------------------------------------------------------------------------------
# Duplicates


def distance_of_duplicates(base, grown):
    """-> by how much the two duplicates of a channel differ, the largest difference of each parameter without
    noise: biases, and the embedding of patches, whose columns are not duplicated."""
    distances = []
    for name, p in grown.named_parameters():
        grew = p.shape != base.get_parameter(name).shape
        if grew and ("bias" in name or name == "patch_embed.weight"):
            pairs = p.detach().unflatten(0, (-1, 2, SMALL.width))  # runs of D, each twice
            distances.append((pairs[:, 0] - pairs[:, 1]).abs().max().item())
    return distances


@pytest.mark.parametrize("operator", ["width", "mlp"])
def test_only_noise_makes_duplicates_differ(operator):
    """Equal halves have equal gradients, so Adam keeps them equal; with noise they go separate ways."""
    inputs = random_inputs(dtype=torch.float64)
    for noise in (0.0, 1.0):
        base = random_model(dtype=torch.float64)
        grown = grow.OPERATORS[operator](base, noise=noise)
        assert len(distance_of_duplicates(base, grown)) > 2
        assert max(distance_of_duplicates(base, grown)) == 0
        optimizer = torch.optim.Adam(grown.parameters(), 0.01)
        for step in range(20):
            gradients(grown, inputs, step)
            optimizer.step()
        distances = distance_of_duplicates(base, grown)
        assert min(distances) > 0.01 if noise else max(distances) < 1e-9


# --------------------------------------------------------------------------------------------------------
# A whole training state


def test_weights_and_ema_grow_with_the_same_random_numbers():
    model = random_model()
    start = Checkpoint(model, copy.deepcopy(model), {}, {}, {})
    steps = [("llm", {"llm_dim": 7}), ("width", {}), ("mlp", {"factor": 3})]
    grown = grown_state_by(start, steps)
    assert all(
        torch.equal(a, b) for a, b in zip(grown.model.parameters(), grown.ema.parameters(), strict=True)
    )


def test_moments_of_groups_of_blocks_are_those_of_the_grown_model():
    base, inputs = random_model(dtype=torch.float64), random_inputs(dtype=torch.float64)
    state = {}
    for name, gradient in gradients(base, inputs).items():
        state[name] = {"step": torch.tensor(40.0), "exp_avg": gradient, "exp_avg_sq": gradient**2}
    grown = grow.grow_state(checkpoint_of(base, state), "depth", add=2, group=2)  # 0 1 2 2' 2'
    truth = gradients(grown.model, inputs)
    assert grown.optimizer_state.keys() == truth.keys() - set(grown.metadata["new"])
    for name, entry in grown.optimizer_state.items():
        assert torch.allclose(entry["exp_avg"], truth[name], rtol=1e-9, atol=1e-15), name


def moments_after_training(model, inputs, options, steps=40):
    """Train `model` -> AdamW's state by name."""
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for _ in range(steps):
        gradients(model, inputs)
        optimizer.step()
    return {name: optimizer.state[p] for name, p in model.named_parameters()}


def test_frozen_parameters_have_no_optimizer_state():
    """With adapters only adapters are trained; merged, nothing is left of their moments."""
    adapted = randomize(grow.add_lora(random_model(), 2))
    options = {"lr": 1e-4, "betas": BETAS, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], **options)
    gradients(adapted, random_inputs())
    optimizer.step()
    moments = {n: optimizer.state[p] for n, p in adapted.named_parameters() if p.requires_grad}
    larger = grow.grow_state(checkpoint_of(adapted, moments), "resolution", size=32)
    assert larger.optimizer_state.keys() == moments.keys()
    assert grow.grow_state(larger, "merge").optimizer_state == {}


def test_history_is_a_tree_and_names_what_is_new():
    trained = {"train": "basic", "steps": 40, "captions": "short", "tune": "all", "seed": 0}
    older = {"grow": "clip", "frames": 4, "size": None, "changed": {"frames": [2, 4]}}  # "resolution" since
    state = checkpoint_of(random_model(), history=[older, trained], new=["final.weight"])
    state = grown_state_by(state, [("depth", {"add": 3}), ("width", {}), ("llm", {"llm_dim": 7})])
    new = {name.rsplit(".", 1)[0] for name in state.metadata["new"]}
    assert {"blocks.1.attn.qkv", "blocks.3.mlp.up", "llm_embed.up", "blocks.0.cross_llm.q"} <= new
    assert not {"blocks.0.attn.qkv", "final", "blocks.4.adaln"} & new
    state.metadata["history"].append({**trained, "steps": 5, "train": "rich"})
    state = grow.grow_state(state, "lora", rank=2)
    assert all("lora_" in name for name in state.metadata["new"])  # those since the last training alone
    state = grow.grow_state(state, "resolution", size=32)
    assert history_tree(state.metadata["history"]).splitlines() == [
        "└─ clip: frames 2 -> 4",
        "   trained 40 steps on basic, short captions, tuning all, seed 0",
        "   └─ depth: depth 3 -> 6, add 3, where insert, zero gate",
        "      └─ width: width 24 -> 48, heads 2 -> 4, factor 2, noise 1.0",
        "         └─ llm: llm_dim 0 -> 7, seed 0",
        "            trained 5 steps on rich, short captions, tuning all, seed 0",
        "            └─ lora: lora_rank 0 -> 2, rank 2",
        "               └─ resolution: size 16 -> 32",
    ]


def test_what_has_grown_stays_new_where_growth_makes_no_parameters():
    """Train, grow in depth, train, duplicate channels: `--tune new` still means the blocks."""
    trained = {"train": "basic", "steps": 40, "captions": "short", "tune": "all", "seed": 0}
    state = grow.grow_state(checkpoint_of(random_model()), "depth", add=2, where="suffix")
    names = state.metadata["new"]
    state.metadata["history"].append(trained)
    state = grow.grow_state(state, "width")
    assert set(state.metadata["new"]) == set(names) and len(names) == 2 * 16


def test_new_parameters_are_followed_through_depth_growth():
    """Blocks move: what an untrained growth has made keeps being named."""
    state = grow.grow_state(checkpoint_of(random_model()), "depth", add=1, where="suffix")
    assert {name.split(".")[1] for name in state.metadata["new"]} == {"3"}
    state = grow.grow_state(state, "depth", add=2, where="prefix")
    assert {name.split(".")[1] for name in state.metadata["new"]} == {"0", "1", "5"}


@pytest.mark.parametrize(
    "steps, message",
    [
        ([("depth", {"add": 0})], "cannot add 0 blocks"),
        ([("depth", {"add": 10**9})], "cannot add 1000000000 blocks"),
        ([("depth", {"add": 1024})], "depth is 1027"),
        ([("depth", {"add": 4, "group": 1})], "3 groups of blocks cannot share 4 copies evenly"),
        ([("depth", {"add": 3, "group": 4})], "cannot cut 3 blocks into groups of 4"),
        ([("depth", {"add": 3, "group": 0})], "cannot cut 3 blocks into groups of 0"),
        ([("depth", {"add": 3, "group": 1, "where": "prefix"})], "prefix stacking has no groups"),
        ([("depth", {"add": 3, "where": "middle"})], "no stacking is called 'middle'"),
        ([("depth", {"add": 3, "zero": "all"})], "cannot zero 'all'"),
        ([("width", {"factor": 1})], "factor is 1"),
        ([("width", {"factor": 1.5})], "factor is 1.5"),
        ([("width", {"noise": float("nan")})], "noise is nan"),
        ([("mlp", {"factor": 0})], "factor is 0"),
        ([("mlp", {"noise": -1.0})], "noise is -1"),
        ([("llm", {"llm_dim": 0})], "llm_dim is 0"),
        ([("llm", {"llm_dim": 5}), ("llm", {"llm_dim": 5})], "has an LLM branch already"),
        ([("resolution", {"size": 16})], "16 pixels already"),
        ([("resolution", {"frames": 7})], "frames is 7"),
        ([("lora", {"rank": 0})], "rank is 0"),
        ([("lora", {"rank": 2}), ("lora", {"rank": 2})], "merge them first"),
        ([("lora", {"rank": 2}), ("depth", {"add": 3})], "merge them first"),
        ([("lora", {"rank": 2}), ("width", {})], "merge them first"),
        ([("lora", {"rank": 2}), ("llm", {"llm_dim": 5})], "merge them first"),
        ([("merge", {})], "no LoRA adapters to merge"),
    ],
)
def test_wrong_use_is_refused_by_name(steps, message):
    with pytest.raises(ValueError, match=message):
        grown_by(random_model(), steps)


def test_a_whole_state_refuses_unknown_growth_and_adapters_on_zeros():
    start = checkpoint_of(random_model())
    with pytest.raises(ValueError, match="no growth is called 'height'"):
        grow.grow_state(start, "height")
    with pytest.raises(ValueError, match="adapters would freeze new parameters"):
        grown_state_by(start, [("depth", {"add": 3}), ("lora", {"rank": 2})])
    wide = grown_state_by(start, [("width", {}), ("lora", {"rank": 2})])  # nothing in it is zero
    assert wide.model.config.lora_rank == 2
    grown_state_by(start, [("depth", {"add": 3, "zero": "none"}), ("lora", {"rank": 2})])
    deep = grown_state_by(start, [("depth", {"add": 3})])
    trained = {"train": "basic", "steps": 9, "captions": "short", "tune": "all", "seed": 0}
    deep.metadata["history"].append(trained)
    grown_state_by(deep, [("resolution", {"size": 64}), ("lora", {"rank": 2})])


def test_adapters_on_a_new_llm_branch_are_refused():
    grown = grow.grow_state(checkpoint_of(random_model()), "llm", llm_dim=7)
    with pytest.raises(ValueError, match="adapters would freeze"):
        grow.grow_state(grown, "lora", rank=2)


# --------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def trained(tmp_path):
    """-> the directory of a run with 40 steps of training on disk."""
    model, inputs = random_model(), random_inputs()
    moments = moments_after_training(model, inputs, {"lr": 1e-4, "betas": BETAS}, steps=3)
    event = {"train": "basic", "steps": 40, "captions": "short", "tune": "all", "seed": 0}
    save_checkpoint(tmp_path / "base" / "checkpoint", checkpoint_of(model, moments, history=[event]))
    return tmp_path / "base"


def test_the_command_grows_a_run_with_its_proof(trained, tmp_path, capsys):
    out = tmp_path / "grown"
    options = f"--depth insert --add 6 --group 1 --out {out}"
    grow.main([str(trained), *options.split()])
    base, grown, new, difference, *rest = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d\d"
    assert re.fullmatch(rf"base +3 blocks of width 24 +{number} M parameters +{number} GFLOPs forward", base)
    assert re.fullmatch(
        rf"grown +9 blocks of width 24 +{number} M parameters +{number} GFLOPs forward", grown
    )
    assert new == "new blocks: 1 2 4 5 7 8"
    expected = r"largest difference in float32: 0 \(largest output \d\.\d+\): the same bits"
    assert re.fullmatch(expected, difference)
    assert rest == [
        f"written to {out}",
        "trained 40 steps on basic, short captions, tuning all, seed 0",
        "└─ depth: depth 3 -> 9, add 6, group 1, where insert, zero gate",
    ]
    before, after = load_checkpoint(trained), load_checkpoint(out)
    assert after.model.config.depth == after.ema.config.depth == 9
    assert len(after.metadata["new"]) == 6 * 16 and after.trainer_state == before.trainer_state
    trained_names = {name for name, _ in after.model.named_parameters()} - set(after.metadata["new"])
    assert after.optimizer_state.keys() == trained_names
    assert {float(state["step"]) for state in after.optimizer_state.values()} == {3}
    inputs = random_inputs()
    assert torch.equal(after.model(*inputs), before.model(*inputs))
    assert torch.equal(after.ema(*inputs), before.ema(*inputs))


@pytest.mark.parametrize(
    "options, exact",
    [
        ("--depth prefix --add 1 --zero proj", True),
        ("--frames 8 --size 8", True),
        ("--lora 3", True),
        ("--depth suffix --patch 2 --width 2 --mlp 3 --noise 0.5", False),
    ],
)
def test_the_command_proves_every_growth(trained, tmp_path, capsys, options, exact):
    grow.main([str(trained), *options.split()])
    printed = capsys.readouterr().out
    found, largest, verdict = re.search(r"float32: (\S+) \(largest output (\S+)\): (.*)\n", printed).groups()
    assert float(largest) > 0.5
    if exact:
        assert (float(found), verdict) == (0, "the same bits")
    else:
        assert 0 < float(found) < 1e-5 and verdict == "the same up to rounding"
        assert "mlp: mlp_ratio 4 -> 12, factor 3, noise 0.5" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]  # without --out nothing is written


def test_the_command_says_that_plain_copies_are_another_function(trained, capsys):
    grow.main([str(trained), "--depth", "insert", "--zero", "none"])
    printed = capsys.readouterr().out
    assert "another function" in printed and "grown  6 blocks" in printed  # as many copies as blocks


def test_the_command_merges_adapters(trained, tmp_path, capsys):
    grow.main([str(trained), "--lora", "3", "--out", str(tmp_path / "lora")])
    grow.main([str(tmp_path / "lora"), "--merge", "--depth", "insert", "--out", str(tmp_path / "merged")])
    printed = capsys.readouterr().out
    assert "      └─ depth: depth 3 -> 6" in printed and "new blocks: 1 3 5\n" in printed
    model, _ = load_model(tmp_path / "merged")
    assert model.config == replace(SMALL, depth=6)


def test_the_command_prints_the_history(trained, capsys):
    grow.main([str(trained)])
    assert capsys.readouterr().out == "trained 40 steps on basic, short captions, tuning all, seed 0\n"


def test_the_command_writes_nothing_that_differs(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(grow, "zero_new_block", lambda block, zero: None)
    with pytest.raises(ValueError, match="must compute the same"):
        grow.main([str(trained), "--depth", "insert", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_command_saves_before_it_prints(trained, tmp_path, monkeypatch):
    def broken(*args):
        raise UnicodeEncodeError("ascii", "└", 0, 1, "cannot be printed")

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(ValueError, match="cannot be printed"):
        grow.main([str(trained), "--width", "2", "--out", str(tmp_path / "out")])
    assert load_checkpoint(tmp_path / "out").model.config.width == 48


@pytest.mark.parametrize(
    "options, message",
    [
        ("--add 2", "--add is for --depth"),
        ("--width 2 --group 2", "--group is for --depth"),
        ("--zero proj", "--zero is for --depth"),
        ("--depth suffix --noise 2", "--noise is for --width and --mlp"),
        ("--depth insert --add 0", "cannot add 0 blocks"),
        ("--depth insert --add 4 --group 1", "cannot share"),
        ("--width 0", "factor is 0"),
        ("--frames 0", "frames is 0"),
        ("--lora 0", "rank is 0"),
        ("--out OUT", "--out is for a grown checkpoint"),
        ("--width 2 --out BASE", "is there already"),
    ],
)
def test_the_command_refuses(trained, tmp_path, options, message):
    options = options.replace("OUT", str(tmp_path / "out")).replace("BASE", str(trained))
    with pytest.raises(ValueError, match=message):
        grow.main([str(trained), *options.split()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
