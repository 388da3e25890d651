"""The report of the study: tables, pictures and verdicts from the JSON files of its runs. One paragraph, on
designs that were removed, stands in this file.

`write_report` writes results/README.md and the pictures beside it. The same JSON files give the same bytes.
Spread is the standard deviation over seeds.

Left out: tables that no verdict rests on (the loss by timestep and the scores by attribute are in the JSON
files).
"""

import json
from pathlib import Path
from statistics import mean

from lab.plots import (
    WHEN,
    plot_actors,
    plot_blocks,
    plot_forgetting,
    plot_losses,
    plot_timing,
)
from lab.tables import BENCHMARK_NAMES, markdown_table, provenance, score_table, spread
from lab.verdicts import (
    RULE,
    gains,
    judge,
    loss_at,
    loss_curve,
    measure,
    savings,
    since_growth,
    spike,
    steps_to_mix,
    verdict,
)
from lab.window import read_scale, scale_claims, scale_section

RATES = ("rates", "gpu-rates")
LOSS_ONLY = ("timing", "longer", *RATES)  # parts that compare the loss on the way and sample nothing
NOT_COVERED = (
    "VBench's aesthetic and imaging quality, styles, human action and overall consistency, and"
    " T2V-CompBench's object interactions"
)
NEGATIVE = (  # of designs that the code no longer has
    "- **A refiner helps** (two blocks of self-attention over the features of the language model, in front of"
    " its branch). Contradicted, and removed from the code. On held-out words: *llm last, refiner* over *llm"
    " last* -0.0246 ± 0.0128 (contradicted), *llm middle, refiner* over *llm middle* -0.0071 ± 0.0284"
    " (open), *llm mean, refiner* over *llm mean* -0.0158 ± 0.0246 (open). Measured at 9b529e9315 with seeds"
    " 0, 1, 2. The last commit that has the refiner and these results is c2dc483."
)

# --------------------------------------------------------------------------------------------------------
# The parts growth, timing, longer and language. found: {arm: {seed: result}}

LOSSES = (
    "Loss on held-out clips, `rich` with detailed and `basic` with short captions: when the budget is spent,"
    " and after equally many steps since the base (or the start). The spike is the mean training loss over"
    " the first 50 steps, less that of *continued* on the same clips, captions and noise. An arm has mixed at"
    " the first step from which on its training loss, averaged over the next 100 steps, is below that of"
    " *continued* (for each seed)."
)
TIMING = (
    "**Does growing need fewer FLOPs than training the large model from scratch?** (Stacking Your"
    " Transformers: 1.5 times fewer.) The table has the loss on `rich` when the budget is spent, without a"
    " decay. It also says how many times fewer FLOPs an arm needed to reach the final loss of *large from"
    " scratch*. The FLOPs of the small model count. The curve of a grown model begins at its growth, so"
    " growth at 80 % cannot show more than 1 / 0.8 = 1.25. *never grown* is the small model, for the whole"
    " budget:"
)
TABLE = (
    "A base that knows `basic` is trained further on `rich`, with short and detailed captions, and the"
    " learning rate decays at the end. All spend the same FLOPs. The loss on `basic` says what is forgotten."
    " In brackets is the verdict on a difference: *holds* if the arm is better than *dense continuation*."
)
LONGER = (
    "**And with four times that budget?** The small model comes nearer to its limit. *Insert* doubles its"
    " blocks; there is no decay:"
)


def claims(found) -> list[str]:
    """A paragraph for each claim some of whose arms are there: the verdict and the gains it rests on."""
    return [f"**{j.claim}** {j.verdict.capitalize()}. {'; '.join(j.reasons)}." for j in judge(found)]


def score_tables(found, baseline) -> list[str]:
    """The mean over the attributes of each set of prompts, and the gain over the arm `baseline`."""
    first_arm = next(iter(found.values()))
    any_scores = next(iter(first_arm.values()))["scores"]
    sets = [name for name, scores in any_scores.items() if isinstance(scores, dict)]
    means, differences = [], []
    for arm, by_seed in found.items():
        cells = [spread([measure(result, name) for result in by_seed.values()]) for name in sets]
        means.append([arm, *cells])
        if arm not in ("base", baseline):
            cells = [spread(gains(by_seed, found.get(baseline, {}), name)) for name in sets]
            differences.append([arm, *cells])
    text = ["Mean over the attributes of each set of prompts:", markdown_table(["arm", *sets], means)]
    if baseline in found:
        text += [f"Gain over *{baseline}*, within each seed:", markdown_table(["arm", *sets], differences)]
    return text


def mixing_cells(by_seed, references) -> list[str]:
    """Two cells of the table of losses: the spike, and the steps to mix of each seed."""
    pairs = [(by_seed[seed], references[seed]) for seed in by_seed if seed in references]
    steps = [steps_to_mix(*pair) for pair in pairs]
    words = ["never" if step is None else str(step) for step in steps]
    return [spread([spike(*pair) for pair in pairs], 4), ", ".join(words)]


def losses_at(by_seed, key, step) -> str:
    """The loss `key` at a step, over all seeds that have its curve."""
    curves = [loss_curve(result, key) for result in by_seed.values()]
    return spread([loss_at(curve, step) for curve in curves if curve], 4)


def loss_table(found, starts) -> str:
    """Part growth: losses when the budget is spent and after equally many steps. starts: {arm: the arm it
    continues from}."""
    final = {}
    for arm, by_seed in found.items():
        final[arm] = [result["curve"][-1]["step"] for result in by_seed.values()]
    equal = min((min(final[arm]) for arm in found if starts[arm] == "base"), default=0)
    rows = []
    for arm, by_seed in found.items():
        other_clips = arm == "base" or "short" in arm  # its curve is of other clips or captions
        cells = [arm, str(round(mean(final[arm])))]
        for name in ("rich", "basic"):
            cells.append(spread([measure(result, name) for result in by_seed.values()], 4))
        cells.append("" if other_clips else losses_at(by_seed, "val_loss", equal))
        cells.append(losses_at(by_seed, "old_val_loss", equal))
        # The training losses compare if both arms read all captions of the same clips.
        comparable = starts[arm] == "base" and arm != "continued" and not other_clips and "llm" not in arm
        cells += mixing_cells(by_seed, found.get("continued", {})) if comparable else ["", ""]
        rows.append(cells)
    titles = ["arm", "steps", "rich", "basic", f"rich, step {equal}", f"basic, step {equal}"]
    return markdown_table([*titles, "spike", "steps to mix"], rows)


def benchmark_table(found, arms) -> str:
    """Scores of these arms, as far as they are there, by the names of VBench and T2V-CompBench."""
    arms = [arm for arm in arms if arm in found]
    rows = []
    for benchmark, (name, column) in BENCHMARK_NAMES.items():
        cells = [benchmark]
        for arm in arms:
            cells.append(spread([result["scores"][name].get(column) for result in found[arm].values()]))
        rows.append(cells)
    return markdown_table(["benchmark", *arms], rows)


def timing_table(found, goal) -> str:
    """A part of losses alone. `goal` is the arm whose final loss the others should reach with less."""
    targets, small = found.get(goal, {}), found.get("never grown", {})
    rows = []
    for arm, by_seed in found.items():
        factors = [] if arm == goal else savings(by_seed, targets)
        lower = [] if arm == "never grown" else gains(by_seed, small, "last")
        cells = [arm, spread([measure(result, "last") for result in by_seed.values()], 4)]
        cells.append(spread(factors, 2) if all(factors) else "")
        cells.append(", ".join(f"{factor:.2f}" if factor else "never" for factor in factors))
        cells += [spread(lower, 4), verdict(lower) if lower else ""]
        rows.append(cells)
    titles = ["arm", "final loss", f"times fewer FLOPs than *{goal}*", "by seed"]
    return markdown_table([*titles, "lower than *never grown* by", "verdict"], rows)


def growth_section(found, starts, results: Path) -> list[str]:
    """The claims, losses and pictures of part growth; the scores come at the end of the report."""
    dashed = [arm for arm, start in starts.items() if start != "base"]
    plot_losses(found, results / "loss.png", dashed)
    plot_forgetting(found, starts, results / "forgetting.png")
    text = [*claims(found), LOSSES, loss_table(found, starts)]
    text += ["![Loss over FLOPs](loss.png)", "![Learned and forgotten](forgetting.png)"]
    if (results / "gallery.gif").is_file():
        text.append("![Base, LoRA, expansion, expansion with an LLM](gallery.gif)")
    return [*text, provenance(found)]


def growth_scores(found) -> list[str]:
    """The scores of part growth."""
    text = ["## Growth: scores", *score_tables(found, "continued")]
    text.append(f"By the names of other benchmarks. Not covered: {NOT_COVERED}.")
    return [*text, benchmark_table(found, ("base", "lora", "insert", "insert + llm", "large from scratch"))]


def timing_section(found, targets, results: Path) -> list[str]:
    """When to grow. targets: {seed: result} of *large from scratch*."""
    plot_timing(found, targets, results / "timing.png")
    with_large = found | {"large from scratch": targets}
    text = [TIMING, timing_table(with_large, "large from scratch"), "![When to grow](timing.png)"]
    return [*text, provenance(found)]


def longer_section(found, results: Path) -> list[str]:
    """Growing or not, with four times the budget."""
    plot_losses(found, results / "longer.png")
    return [LONGER, timing_table(found, "never grown"), "![Longer](longer.png)", provenance(found)]


def rates_section(found, where="") -> list[str]:
    """The last loss of each kind of further training, by learning rate."""
    rows = []
    for arm, by_seed in found.items():
        if arm != "base":  # it learns other clips
            rows.append([arm, spread([measure(result, "last") for result in by_seed.values()], 4)])
    table = markdown_table(["kind, rate at width 128", "loss on rich, captions both"], rows)
    return [f"## Learning rates{where}", table, provenance(found)]


def what_is_learned(found) -> str:
    """The paper's table: learning rates, steps, and the losses on new and on old data."""
    continued = found.get("dense continuation", {})
    rows = []
    for arm, by_seed in found.items():
        result = by_seed[min(by_seed)]
        options = result["arguments"]
        cells = [arm, options[options.index("--lr") + 1] if "--lr" in options else ""]
        cells.append(str(result["curve"][-1]["step"]))
        for name in ("rich", "basic"):
            cells.append(spread([measure(each, name) for each in by_seed.values()], 4))
            lower = gains(by_seed, continued, name) if arm not in ("base", "dense continuation") else []
            cells.append(f"{spread(lower, 4)} ({verdict(lower)})" if lower else "")
        rows.append(cells)
    titles = ["arm", "rate", "steps"]
    for name in ("rich", "basic"):
        titles += [f"loss on {name}", "lower than *dense continuation* by"]
    return markdown_table(titles, rows)


def table_section(found, where="") -> list[str]:
    """The paper's table."""
    text = [f"## The paper's table{where}", *claims(found), TABLE, what_is_learned(found)]
    text += score_tables(found, "dense continuation")
    return [*text, "By the names of other benchmarks:", benchmark_table(found, found), provenance(found)]


def language_section(found) -> list[str]:
    """Does a language model help?"""
    scores = score_tables(found, "base encoder")
    text = ["## Language", *claims(found), *scores, provenance(found)]
    return [*text, "## Negative results of designs that were removed", NEGATIVE]


# --------------------------------------------------------------------------------------------------------
# What the blocks do (lab/blocks.py). found: {(where, when): {seed: result}}

BLOCKS = (
    "What each block does, before growth, at growth and after training (lab/blocks.py). The importance of a"
    " block is 1 - E[cos(input, output)] (SANA-1.5). Its removal cost is the loss on `rich` without it, minus"
    " that of the whole model. The table has means over the old and over the new blocks of a model; in the"
    " picture the new blocks are hollow:"
)


def mean_of_blocks(result, name, new) -> float | None:
    """The mean of a number of the blocks of a result over the new ones, or over the old ones."""
    values = [value for value, is_new in zip(result[name], result["new"], strict=True) if is_new == new]
    return mean(values) if values else None


def blocks_table(found) -> str:
    """Means over old and new blocks. found: {(where, when): {seed: result}}."""
    rows = []
    for (where, when), by_seed in found.items():
        history = by_seed[min(by_seed)]["history"]
        steps = " + ".join(str(event["steps"]) for event in history if "train" in event)
        cells = [f"{where}, {when}" if where else when, steps]
        cells.append(spread([result["loss"] for result in by_seed.values()], 4))
        for name in ("importance", "cost"):
            for new in (False, True):
                values = [mean_of_blocks(result, name, new) for result in by_seed.values()]
                cells.append(spread(values, 4))
        rows.append(cells)
    titles = ["checkpoint", "steps", "loss", "importance, old", "importance, new"]
    return markdown_table([*titles, "removal cost, old", "removal cost, new"], rows)


PRUNED = "Without the least important blocks (`lab.blocks --prune`):"


def pruned_table(found) -> str:
    """What it costs to remove blocks again; empty if that was not measured."""
    rows = []
    for (where, when), by_seed in found.items():
        results = [result for result in by_seed.values() if "pruned" in result]
        if results:
            new = [sum(result["new"][i] for i in result["pruned"]["removed"]) for result in results]
            higher = [result["pruned"]["loss"] - result["loss"] for result in results]
            removed = len(results[0]["pruned"]["removed"])
            cells = [f"{where}, {when}", str(removed), ", ".join(map(str, new))]
            rows.append([*cells, spread(higher, 4)])
    titles = ["checkpoint", "removed", "new ones among them, by seed", "loss higher by"]
    return markdown_table(titles, rows) if rows else ""


def blocks_section(found, folder: Path) -> list[str]:
    """What the new blocks do. found: {(where, when): {seed: result}}."""
    plot_blocks(found, folder / "blocks.png")
    text = ["## What the blocks do", BLOCKS, blocks_table(found)]
    insert, suffix = (found.get((where, "after"), {}) for where in ("insert", "suffix"))
    differences = []
    for seed in sorted(insert.keys() & suffix.keys()):
        costs = [mean_of_blocks(each[seed], "cost", True) for each in (insert, suffix)]
        differences.append(costs[0] - costs[1])
    if differences:
        gain = f"{spread(differences, 4)} ({verdict(differences)})"
        text.append(
            f"After training the removal cost of a new block is higher with insert than with suffix: {gain}."
        )
    pruned = pruned_table(found)
    if pruned:
        text += [PRUNED, pruned]
    return [*text, "![Blocks](blocks.png)", provenance(found)]


# --------------------------------------------------------------------------------------------------------
# Complex prompts, over the FLOPs of training (lab/actors.py)


def actors_table(result) -> str:
    """The scores of the last point of a curve, and below them those of true clips of the same size."""
    rows = dict(result["points"][-1]["scores"])
    rows |= {f"true clips: {name}": scores for name, scores in result["ceiling"].items()}
    return score_table(rows)


def actors_section(folder: Path) -> list[str]:
    """A table and a picture of each curve in `folder`/actors."""
    text = []
    for file in sorted((folder / "actors").glob("*.json")):
        result = json.loads(file.read_text())
        plot_actors(result, folder / f"actors-{file.stem}.png")
        first, point = result["arguments"][0], result["points"][-1]
        text.append(f"## Complex prompts, and when they are learned: {file.stem}")
        text.append(
            f"The last point of the curve: `{point['checkpoint']}`, after {point['flops']:.2g} FLOPs. The"
            f" first run had seed {first['seed']}. {result['count']} prompts a set."
        )
        text += [actors_table(result), f"![Accuracy over FLOPs](actors-{file.stem}.png)"]
        text.append(provenance({file.stem: {first["seed"]: result}}))
    return text


# --------------------------------------------------------------------------------------------------------
# The report


def read_part(folder: Path, part, arms) -> dict:
    """The results of a part -> {arm: {seed: result}}, in the order of `arms`, without those that exist only
    for others to continue from. arms: {arm: (the arm it continues from, options)}."""
    by_arm = {arm: {} for arm in arms}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if result["arm"] in by_arm:
            by_arm[result["arm"]][result["seed"]] = result
    starts = {arm: start for arm, (start, _) in arms.items()}
    found = {}
    for arm, by_seed in by_arm.items():
        if by_seed and not arm.startswith("_"):
            found[arm] = dict(sorted(by_seed.items()))
            for seed in by_seed if part in LOSS_ONLY else ():
                found[arm][seed] = since_growth(arm, seed, by_arm, starts)
    return found


def read_blocks(folder: Path) -> dict:
    """The results of lab/blocks.py -> {(where, when): {seed: result}}, in the order of life."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = {}
    for result in sorted(results, key=lambda each: (each["where"], WHEN.index(each["when"]), each["seed"])):
        found.setdefault((result["where"], result["when"]), {})[result["seed"]] = result
    return found


def budget_claims(found) -> list[list[str]]:
    """When growing pays: rows of the first table, from the parts timing and longer."""
    half, never = "insert at 50 %", "never grown"
    rows = []
    factors = savings(found["timing"].get(half, {}), found["growth"].get("large from scratch", {}))
    if factors:
        saved = [(factor or 0) - 1 for factor in factors]  # None: it never had that loss
        claim = "Doubling the blocks after half of the budget saves FLOPs over the large model from scratch."
        rows.append([claim, verdict(saved)])
    for part, budget in (("timing", "At this budget"), ("longer", "With four times this budget")):
        gained = gains(found[part].get(half, {}), found[part].get(never, {}), "last")
        if gained:
            claim = f"{budget}, without a decay, doubling the blocks after half of it beats never growing."
            rows.append([claim, verdict(gained)])
    return rows


def heading(results, found, parts, scales) -> list[str]:
    """The first page: when growth pays, all verdicts, and over which seeds the means are. scales: the results
    of lab/scale.py by folder."""
    judged = [*judge(found["growth"]), *judge(found["table"]), *judge(found["language"])]
    of_budgets = [row for path, scale in scales.items() for row in scale_claims(path.name, scale)]
    rows = [*budget_claims(found), *of_budgets, *([j.claim, j.verdict] for j in judged)]
    rows += [[f"On a GPU: {j.claim}", j.verdict] for j in judge(found["gpu-table"])]
    text = []
    if of_budgets:
        picture = next(f"{path.name}-gain.png" for path, scale in scales.items() if scale)
        text.append(f"![Growing pays above zero, over the budget]({picture})")
    elif found["longer"]:
        text.append("![Growing or not, with four times the budget](longer.png)")
    if rows:
        text.append(markdown_table(["claim", "verdict"], rows))
    seeds = sorted({result["seed"] for result in results})
    spread_over = f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}."
    begun = [part for part in parts if found[part] and part not in RATES]  # they need one seed
    wanted = 3 * sum(not arm.startswith("_") for part in begun for arm in parts[part])
    there = sum(len(by_seed) for part in begun for by_seed in found[part].values())
    if there < wanted:
        spread_over += f" Under way: {there} of {wanted} runs are in."
    return [*text, spread_over]


def write_report(folder: Path, parts) -> str:
    """Make tables, pictures and verdicts of what is in `folder`/PART/*.json. The text is returned and written
    to README.md there. parts: {part: {arm: (the arm it continues from, options)}}. Raises FileNotFoundError
    if there are no results."""
    found = {part: read_part(folder / part, part, arms) for part, arms in parts.items()}
    results = [result for arms in found.values() for by_seed in arms.values() for result in by_seed.values()]
    scales = {path: read_scale(path) for path in sorted(folder.glob("scale*")) if path.is_dir()}
    scale = [paragraph for path, each in scales.items() for paragraph in scale_section(path, each)]
    blocks = read_blocks(folder / "blocks")
    if not (results or scale or blocks):
        raise FileNotFoundError(f"there are no results in {folder}: run `python -m lab.study` first")
    text = ["# Results", "Written by `python -m lab.study --report`."]
    if results:
        text += heading(results, found, parts, scales)
    text.append(RULE)
    growth = found["growth"]
    if growth:
        starts = {arm: start for arm, (start, _) in parts["growth"].items()}
        text += growth_section(growth, starts, folder)
    if found["timing"] and "large from scratch" in growth:
        text += timing_section(found["timing"], growth["large from scratch"], folder)
    if found["longer"]:
        text += longer_section(found["longer"], folder)
    for prefix, where in (("", ""), ("gpu-", " on a GPU")):
        if found[f"{prefix}rates"]:
            text += rates_section(found[f"{prefix}rates"], where)
        if found[f"{prefix}table"]:
            text += table_section(found[f"{prefix}table"], where)
    text += scale
    if blocks:
        text += blocks_section(blocks, folder)
    text += actors_section(folder)
    if found["language"]:
        text += language_section(found["language"])
    reader = folder / "reader.json"
    if reader.is_file():
        text += ["## The reader", "What it reads of true clips:", score_table(json.loads(reader.read_text()))]
    if growth:
        text += growth_scores(growth)
    report = "\n\n".join(text) + "\n"
    (folder / "README.md").write_text(report)
    return report
