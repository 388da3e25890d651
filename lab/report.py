"""The report of the study: tables, pictures and verdicts from the JSON files of its runs, and nothing else.

Spread is the standard deviation over seeds. Differences between two arms are taken within each seed, because
both continue from the same base with the same batches and noise. Two or three seeds make a weak test. The
rule for a verdict (`RULE`) was fixed before the runs, which keeps it honest.

`write_report` writes results/README.md and the pictures beside it. The same JSON files give the same bytes.

Left out: significance tests, confidence intervals, and tables that no verdict rests on (the loss by timestep
and the scores by attribute are in the JSON files).
"""

import itertools
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np

RULE = (
    "A claim *holds* if the difference is positive in every seed and its mean exceeds twice its standard"
    " error. It is *contradicted* if the same is true with the opposite sign. Otherwise it is *open*. A claim"
    " with several comparisons holds if all of them hold, and one that is contradicted contradicts it."
)
ACTOR_SETS = ("seen", "several actors", "long")  # prompts of one actor, and of two or three in two styles
LOSS_ONLY = ("timing", "longer", "rates")  # parts that compare the loss on the way and sample nothing

SCORE_COLUMNS = (  # of a table of scores; a set of prompts has some of them
    "subject", "colour", "motion", "background", "change", "count", "relation", "all",
)  # fmt: skip
BENCHMARK_NAMES = {  # a benchmark and its name for a score: (our set of prompts, our name)
    "T2V-CompBench consistent attribute binding": ("several actors", "colour"),
    "T2V-CompBench dynamic attribute binding": ("several actors", "change"),
    "T2V-CompBench spatial relationships": ("several actors", "relation"),
    "T2V-CompBench motion binding": ("several actors", "direction"),
    "T2V-CompBench action binding": ("several actors", "action"),
    "T2V-CompBench generative numeracy": ("several actors", "count"),
    "VBench subject consistency": ("seen", "subject consistency"),
    "VBench background consistency": ("seen", "background consistency"),
    "VBench temporal flickering": ("seen", "flicker"),
    "VBench motion smoothness": ("seen", "smoothness"),
    "VBench dynamic degree": ("seen", "dynamic"),
    "VBench object class": ("seen", "subject"),
    "VBench multiple objects": ("several actors", "together"),
    "VBench color": ("seen", "colour"),
    "VBench spatial relationship": ("several actors", "relation"),
    "VBench scene": ("seen", "background"),
}
NOT_COVERED = (
    "VBench's aesthetic and imaging quality, styles, human action and overall consistency, and"
    " T2V-CompBench's object interactions"
)

# Claims, each with the comparisons that must all hold: "better arm > worse arm: what is measured".
# That is the loss on rich or basic when the budget is spent, the loss on basic after equally many steps, the
# last loss of the curve, or the scores of a set of prompts, or of two such sets, one for each arm.
CLAIMS = """
Blocks that are inserted evenly beat blocks at the end (suffix), and those beat blocks at the start (prefix).
    insert > suffix: rich
    suffix > prefix: rich
Zero-initialized copies (function-preserving) keep what was learned better than plain copies.
    insert > insert, plain copies: basic
Zero-initialized copies learn more than plain copies.
    insert > insert, plain copies: rich
On the new data expansion beats dense continuation, and dense continuation beats LoRA.
    insert > continued: rich
    continued > lora: rich
Expansion forgets less of the old data than dense continuation.
    insert > continued: basic
    insert > continued: basic, equal steps
LoRA forgets less than expansion.
    lora > insert: basic
With the same further FLOPs expansion beats dense continuation and LoRA on prompts of several actors.
    expansion > dense continuation: several actors
    expansion > dense continuation: long
    expansion > lora: several actors
    expansion > lora: long
The language model helps there too.
    dense continuation + llm > dense continuation: long
    expansion + llm > expansion: long
Expansion forgets fewer of the prompts of one actor than dense continuation.
    expansion > dense continuation: seen
Freezing the old blocks, as LLaMA-Pro does, reduces forgetting.
    insert, old blocks frozen > insert: basic
The language model helps on prompts of several actors, long or short.
    insert + llm > insert: long
    insert + llm, short captions > insert, short captions: several actors
Detailed training captions help, if each model is prompted in the style that it was trained on.
    insert > insert, short captions: long against several actors
    insert + llm > insert + llm, short captions: long against several actors
Growing a base trained on `basic` beats training the large model from scratch with the whole budget.
    insert > large from scratch: rich
Growing a base trained on `basic` beats growing an untrained base.
    insert > insert into an untrained base: rich
The language model helps with words that were in no training caption.
    llm last > base encoder: held-out words
    llm middle > base encoder: held-out words
    llm mean > base encoder: held-out words
The language model costs accuracy on words of the training captions.
    base encoder > llm last: seen
    base encoder > llm middle: seen
    base encoder > llm mean: seen
The gain on new words comes from what the language model says, not from a second branch or its parameters.
    llm mean > minilm twice: held-out words
    llm mean, nothing hidden > wrong captions, nothing hidden: held-out words
The mean over the layers of the language model is better than its last layer.
    llm mean > llm last: held-out words
"""
NEGATIVE = (  # of designs that the code no longer has
    "- **A refiner helps** (two blocks of self-attention over the features of the language model, in front of"
    " its branch). Contradicted, and removed from the code. On held-out words: *llm last, refiner* over *llm"
    " last* -0.0246 ± 0.0128 (contradicted), *llm middle, refiner* over *llm middle* -0.0071 ± 0.0284"
    " (open), *llm mean, refiner* over *llm mean* -0.0158 ± 0.0246 (open). Measured at 9b529e9315 with seeds"
    " 0, 1, 2. The last commit that has the refiner and these results is c2dc483."
)


# --------------------------------------------------------------------------------------------------------
# Tables


def markdown_table(titles, rows) -> str:
    """A table in Markdown, from the titles of its columns and rows of strings."""
    lines = []
    for cells in (titles, ["---"] * len(titles), *rows):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """{set of prompts: {name: share}} -> a table with a row for each set."""
    rows = []
    for name, shares in scores.items():
        cells = [f"{shares[column]:.3f}" if column in shares else "" for column in SCORE_COLUMNS]
        rows.append([name, *cells])
    return markdown_table(["", *SCORE_COLUMNS], rows)


def spread(values, digits=3) -> str:
    """Mean and standard deviation over seeds, "0.512 ± 0.011". Values that are None do not count; without
    any the text is empty."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


# --------------------------------------------------------------------------------------------------------
# Numbers of one result, and of two


def attribute_mean(scores) -> float:
    """The scores of a set of prompts -> the mean over the attributes, without "all"."""
    return mean(scores[name] for name in SCORE_COLUMNS[:-1] if name in scores)


def loss_curve(result, key):
    """The curve of a validation loss -> [(steps, FLOPs so far, loss)]."""
    return [(entry["step"], entry["flops"], entry[key]) for entry in result["curve"] if key in entry]


def loss_at(curve, step) -> float:
    """The loss at a step of a curve from `loss_curve`, on the straight line between its points."""
    steps = [point[0] for point in curve]
    losses = [point[2] for point in curve]
    return float(np.interp(step, steps, losses))


def measure(result, name) -> float:
    """A number of a result: the loss on "basic" or "rich", the "last" loss of its curve, or the mean over the
    attributes of a set of prompts."""
    if name == "last":
        return loss_curve(result, "val_loss")[-1][2]
    if name == "basic":
        return mean(result["scores"]["val_loss"])
    if name == "rich":
        return mean(result["scores"]["rich_loss"])
    return attribute_mean(result["scores"][name])


def gain(better, worse, name) -> float:
    """By how much one result is better than another in what `name` says (see `CLAIMS`)."""
    if name in ("basic", "rich", "last"):  # less is better
        return measure(worse, name) - measure(better, name)
    if name == "basic, equal steps":
        mine = loss_curve(better, "old_val_loss")
        other = loss_curve(worse, "old_val_loss")
        step = min(mine[-1][0], other[-1][0])
        return loss_at(other, step) - loss_at(mine, step)
    mine, _, other = name.partition(" against ")
    return measure(better, mine) - measure(worse, other or mine)


def gains(better, worse, name) -> list[float]:
    """`gain` for each seed that both arms have. Both are {seed: result}."""
    seeds = sorted(better.keys() & worse.keys())
    return [gain(better[seed], worse[seed], name) for seed in seeds]


def verdict(values) -> str:
    """The gains of all seeds -> "holds", "contradicted" or "open"."""
    if len(values) < 2:
        return "open"
    standard_error = stdev(values) / math.sqrt(len(values))
    if abs(mean(values)) <= 2 * standard_error:
        return "open"
    if min(values) > 0:
        return "holds"
    return "contradicted" if max(values) < 0 else "open"


def loss_gaps(result, reference) -> list[tuple[int, float]]:
    """How much higher the training loss is than that of another arm -> [(step, difference)]. Both saw the
    same clips with the same timesteps and noise, so most of the noise cancels."""
    losses = []
    for each in (result, reference):
        losses.append({entry["step"]: entry["loss"] for entry in each["curve"] if "loss" in entry})
    mine, other = losses
    return [(step, mine[step] - other[step]) for step in sorted(mine.keys() & other.keys())]


def spike(result, reference, steps=50) -> float | None:
    """The mean loss gap to another arm over the first steps; None if no loss was logged there."""
    first = [gap for step, gap in loss_gaps(result, reference) if step <= steps]
    return mean(first) if first else None


def steps_to_mix(result, reference, window=10) -> int | None:
    """The first step from which the mean loss gap to another arm, over `window` entries of the curve, is
    negative; None if there is none."""
    found = loss_gaps(result, reference)
    for i in range(len(found) - window + 1):
        if mean(gap for _, gap in found[i : i + window]) < 0:
            return found[i][0]
    return None


def first_reached(points, value) -> float | None:
    """Where the line through [(x, loss)] comes down to `value` for the first time; None if it never does."""
    if points[0][1] <= value:
        return points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= value:
            return x0 + (x1 - x0) * (y0 - value) / (y0 - y1)
    return None


def savings(by_seed, targets) -> list:
    """By what factor an arm needed fewer FLOPs for the final loss of `targets`, for each seed that both have;
    None if it did not get there. Both are {seed: result}."""
    factors = []
    for seed in sorted(by_seed.keys() & targets.keys()):
        _, budget, target = loss_curve(targets[seed], "val_loss")[-1]
        points = [(flops, loss) for _, flops, loss in loss_curve(by_seed[seed], "val_loss")]
        spent = first_reached(points, target)
        factors.append(spent and budget / spent)
    return factors


def since_growth(arm, seed, by_arm, starts):
    """A result whose curve begins with the curves of the arms it continued from, back to the last growth: the
    whole life of that model. by_arm: {arm: {seed: result}}; starts: {arm: the arm it continues from}."""
    result = by_arm[arm][seed]
    curve = result["curve"]
    while "--grow" not in by_arm[arm][seed]["arguments"]:
        arm = starts[arm]
        if seed not in by_arm.get(arm, {}):
            break
        curve = by_arm[arm][seed]["curve"] + curve
    return result | {"curve": curve}


# --------------------------------------------------------------------------------------------------------
# Numbers of several budgets (lab/scale.py). found: {budget: {arm: {seed: result}}}


def final_losses(found, arm, seed) -> list[tuple[float, float]]:
    """[(FLOPs, final loss)] of an arm, for each budget that this seed has."""
    points = []
    for arms in found.values():
        if seed in arms.get(arm, {}):
            _, flops, loss = loss_curve(arms[arm][seed], "val_loss")[-1]
            points.append((flops, loss))
    return points


def flops_for(points, loss) -> float | None:
    """The FLOPs for which [(FLOPs, loss)] comes down to `loss`, on the power law between neighbours; None if
    it never does, or is lower from the start: how much lower the FLOPs could be is not known then."""
    if not points or points[0][1] < loss:
        return None
    reached = first_reached([(math.log(x), math.log(y)) for x, y in points], math.log(loss))
    return None if reached is None else math.exp(reached)


def equal_loss_ratio(found, budget, arm, other, seed) -> float | None:
    """How many times the FLOPs of an arm another one needs for the same loss: the final loss of the arm with
    this budget, or if the other one never has that, the final loss of the other one. None if no budget tells,
    or one of the two results is not there."""
    pair = [found[budget].get(name, {}).get(seed) for name in (arm, other)]
    if None in pair:
        return None
    (_, flops, loss), (_, other_flops, other_loss) = (loss_curve(each, "val_loss")[-1] for each in pair)
    needed = flops_for(final_losses(found, other, seed), loss)
    if needed is not None:
        return needed / flops
    needed = flops_for(final_losses(found, arm, seed), other_loss)
    return None if needed is None else other_flops / needed


def crossing(found, arm, other, seed) -> float | None:
    """From how many FLOPs on the final loss of an arm is lower than that of another one; 0 if it is from the
    smallest budget on, None if it never is or a result is missing. Between two budgets the difference is
    taken as straight over the logarithm of the FLOPs."""
    mine, theirs = (final_losses(found, name, seed) for name in (arm, other))
    if len(mine) != len(theirs) or not mine:
        return None
    gaps = [(math.log(x), loss - lower) for (x, loss), (_, lower) in zip(mine, theirs, strict=True)]
    if gaps[0][1] < 0:
        return 0.0
    reached = first_reached(gaps, 0.0)
    return None if reached is None else math.exp(reached)


def steps_to_cross(result, reference) -> int | None:
    """The first step since its growth from which a model has a lower validation loss than `reference` at
    equal FLOPs; None if there is none. Points are those of its curve; `reference` is straight between its
    own, over the logarithm of the FLOPs."""
    curve = [point for point in loss_curve(reference, "val_loss") if point[1] > 0]
    flops = np.log([point[1] for point in curve])
    losses = [point[2] for point in curve]
    first = None
    for step, spent, loss in reversed(loss_curve(result, "val_loss")):
        if loss >= np.interp(np.log(spent), flops, losses):
            break
        first = step
    return first


# --------------------------------------------------------------------------------------------------------
# Sections of the report. found: {arm: {seed: result}}


def read_claims() -> dict[str, list[tuple[str, str, str]]]:
    """CLAIMS -> {claim: [(better arm, worse arm, what is measured)]}."""
    found = {}
    for line in CLAIMS.strip().splitlines():
        if not line.startswith(" "):
            comparisons = found[line] = []
            continue
        arms, name = line.strip().split(": ")
        comparisons.append((*arms.split(" > "), name))
    return found


def claims(found) -> list[str]:
    """A paragraph for each claim some of whose arms are there: the verdict and the gains it rests on. A
    missing comparison leaves a claim open; a contradicted one decides it."""
    text = []
    for claim, comparisons in read_claims().items():
        reasons, verdicts = [], []
        for better, worse, name in comparisons:
            values = gains(found.get(better, {}), found.get(worse, {}), name)
            verdicts.append(verdict(values))
            if values:
                reasons.append(f"*{better}* over *{worse}*, {name}: {spread(values, 4)} ({verdicts[-1]})")
        if reasons:
            decisive = next(v for v in ("contradicted", "open", "holds") if v in verdicts)
            text.append(f"**{claim}** {decisive.capitalize()}. {'; '.join(reasons)}.")
    return text


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


def benchmark_table(found) -> str:
    """Part growth: scores by the names of VBench and T2V-CompBench."""
    arms = [arm for arm in ("base", "lora", "insert", "insert + llm", "large from scratch") if arm in found]
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
    return markdown_table([*titles, "lower than *never grown* by", "in every seed"], rows)


LOSSES = (
    "Loss on held-out clips, `rich` with detailed and `basic` with short captions: when the budget is spent,"
    " and after equally many steps since the base (or the start). The spike is the mean training loss over"
    " the first 50 steps, less that of *continued* on the same clips, captions and noise. An arm has mixed at"
    " the step from which its training loss stays below that of *continued* for 100 steps (for each seed)."
)
TIMING = (
    "**Growing needs fewer FLOPs than training the large model from scratch (Stacking Your Transformers: 1.5"
    " times fewer).** The table has the loss on `rich` when the budget is spent. It also says how many times"
    " fewer FLOPs, those of the small model included, were enough for the final loss of *large from scratch*."
    " The curve of a grown model begins at its growth. *never grown* is the small model, for the whole"
    " budget:"
)
LONGER = (
    "**With four times that budget, nearer to the limit of the small model, growing it beats dense"
    " continuation.**"
)


def growth_section(found, starts, results: Path) -> list[str]:
    """The claims, losses and pictures of part growth; the scores come at the end of the report."""
    dashed = [arm for arm, start in starts.items() if start != "base"]
    plot_losses(found, results / "loss.png", dashed)
    plot_forgetting(found, starts, results / "forgetting.png")
    text = [*claims(found), LOSSES, loss_table(found, starts)]
    text += ["![Loss over FLOPs](loss.png)", "![Learned and forgotten](forgetting.png)"]
    if (results / "gallery.gif").is_file():
        text.append("![Base, LoRA, expansion, expansion with an LLM](gallery.gif)")
    return text


def growth_scores(found) -> list[str]:
    """The scores of part growth."""
    text = ["## Growth: scores", *score_tables(found, "continued")]
    text.append(f"By the names of other benchmarks. Not covered: {NOT_COVERED}.")
    return [*text, benchmark_table(found)]


def timing_section(found, targets, results: Path) -> list[str]:
    """When to grow. targets: {seed: result} of *large from scratch*."""
    plot_timing(found, targets, results / "timing.png")
    with_large = found | {"large from scratch": targets}
    return [TIMING, timing_table(with_large, "large from scratch"), "![When to grow](timing.png)"]


def longer_section(found, results: Path) -> list[str]:
    """Growing or not, with four times the budget."""
    plot_losses(found, results / "longer.png")
    return [LONGER, timing_table(found, "never grown"), "![Longer](longer.png)"]


SCALE = (
    "The loss on `rich` of models that were trained, grown or not, with several budgets (lab/scale.py). A"
    " budget counts the FLOPs of training, those of the base included. In its last fifth the learning rate"
    " decays to zero. *Lower by* is a difference of final losses within each seed, with the verdict by the"
    " rule above (holds: the arm is better). *Times fewer FLOPs* says how many times its FLOPs another arm"
    " needs for the same loss, by the power law between two budgets, and in brackets the same if the base is"
    " there already and its FLOPs are not counted. *Mixes at* is the step after growth from which the loss is"
    " lower than that of *never grown* at equal FLOPs, for each seed. Tokens are those of the clips, as often"
    " as they were seen, the base's included. The steps of a grown model are those since its growth."
)
NEVER, SCRATCH = "never grown", "large from scratch"
EXTRA = "large from scratch, additional compute"  # as much as HALFWAY spends after growth
HALFWAY = "doubled at 50 %"


def ratio_cell(found, budget, arm, other) -> str:
    """Times fewer FLOPs than another arm, and with the base free: "1.25 ± 0.03 (2.50 ± 0.06)"."""
    counted, free = [], []
    for seed, result in found[budget][arm].items():
        ratio = equal_loss_ratio(found, budget, arm, other, seed)
        if ratio is not None:
            counted.append(ratio)
            free.append(ratio * result["flops"] / (result["flops"] - result["base_flops"]))
    if not counted or arm == other:
        return ""
    grown = any(result["base_flops"] for result in found[budget][arm].values())
    return spread(counted, 2) + (f" ({spread(free, 2)})" if grown else "")


def lower_cell(arms, arm, other) -> str:
    """By how much the final loss of an arm is lower than that of another one, and the verdict."""
    values = gains(arms[arm], arms.get(other, {}), "last")
    return f"{spread(values, 4)} ({verdict(values)})" if values and arm != other else ""


def mixing_cell(arms, arm) -> str:
    """Where a grown model crosses *never grown*, for each seed."""
    words = []
    for seed, result in arms[arm].items():
        if result["base_flops"] and seed in arms.get(NEVER, {}):
            step = steps_to_cross(result, arms[NEVER][seed])
            words.append("never" if step is None else str(step))
    return ", ".join(words)


def budget_table(found, budget) -> str:
    """The arms of one budget."""
    rows = []
    for arm, by_seed in found[budget].items():
        result = by_seed[min(by_seed)]
        cells = [arm, str(result["curve"][-1]["step"])]
        cells.append(spread([measure(each, "last") for each in by_seed.values()], 4))
        cells += [lower_cell(found[budget], arm, other) for other in (NEVER, SCRATCH)]
        cells += [ratio_cell(found, budget, arm, other) for other in (NEVER, SCRATCH)]
        cells += [mixing_cell(found[budget], arm), f"{result['tokens'] / result['parameters']:.2g}"]
        rows.append(cells)
    titles = ["arm", "steps", "final loss"]
    for what in ("lower than", "times fewer FLOPs than"):
        titles += [f"{what} *{other}*" for other in (NEVER, SCRATCH)]
    return markdown_table([*titles, "mixes at", "tokens per parameter"], rows)


def crossing_word(flops: float | None) -> str:
    """What `crossing` says, in a word."""
    if flops is None:
        return "never"
    return f"{flops:.2g}" if flops else "always"


def crossing_table(found) -> str:
    """From how many FLOPs on each arm has the lower loss, for each seed."""
    seeds_of = {}
    for by_arm in found.values():
        for arm, by_seed in by_arm.items():
            seeds_of.setdefault(arm, set()).update(by_seed)
    rows = []
    for arm, seeds in seeds_of.items():
        if arm == EXTRA:  # it spends less
            continue
        cells = [arm]
        for other in (NEVER, SCRATCH):
            words = [crossing_word(crossing(found, arm, other, seed)) for seed in sorted(seeds)]
            cells.append(", ".join(words) if arm != other else "")
        rows.append(cells)
    titles = ["FLOPs from which the final loss is lower than that of", f"*{NEVER}*", f"*{SCRATCH}*"]
    return markdown_table(titles, rows)


def scale_section(found, folder: Path) -> list[str]:
    """The window of growth."""
    plot_scale(found, folder / "scale.png")
    plot_window(found, folder / "window.png")
    text = ["## The window of growth", SCALE]
    text += ["![Loss over FLOPs](scale.png)", "![Gain over never growing](window.png)"]
    text.append(crossing_table(found))
    for budget, arms in found.items():
        by_seed = next(iter(arms.values()))
        arguments = by_seed[min(by_seed)]["arguments"]
        clips, batch = (arguments[arguments.index(name) + 1] for name in ("--clips", "--batch"))
        text.append(f"Budget {budget:g} ({clips} clips, {batch} a step):")
        text.append(budget_table(found, budget))
        if HALFWAY in arms and EXTRA in arms:
            same = f"If the base is there already, *{HALFWAY}* and *{EXTRA}* spend the same."
            text.append(f"{same} The first one's loss is lower by {lower_cell(arms, HALFWAY, EXTRA)}.")
    return text


BLOCKS = (
    "What each block does, before growth, at growth and after training (lab/blocks.py). The importance of a"
    " block is 1 - E[cos(input, output)] (SANA-1.5). Its removal cost is the loss on `rich` without it, minus"
    " that of the whole model. The table has means over the old and over the new blocks of a model; in the"
    " picture the new blocks are hollow:"
)
WHEN = ("before", "at growth", "after")


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
    return [*text, "![Blocks](blocks.png)"]


# --------------------------------------------------------------------------------------------------------
# Pictures

PLOT_COLOURS = [f"C{i}" for i in range(10)] + ["goldenrod", "black", "navy", "lime", "tomato", "teal"]


def new_plot(**labels):
    """-> a figure and its axes, drawn without a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot(**labels)


def save_plot(figure, path):
    """Write a picture; the same numbers give the same bytes."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def mean_curve(by_seed):
    """The mean over seeds of the curves of a validation loss -> (FLOPs, losses), without the start."""
    curves = [loss_curve(result, "val_loss") for result in by_seed.values()]
    flops, losses = [], []
    for points in zip(*curves, strict=False):  # point i of every seed
        flops.append(mean(point[1] for point in points))
        losses.append(mean(point[2] for point in points))
    return flops[1:], losses[1:]


def plot_losses(found, path: Path, dashed=()):
    """Loss on `rich` over FLOPs, means over seeds."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", ylabel="loss on rich", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    for number, (arm, by_seed) in enumerate(found.items()):
        result = by_seed[min(by_seed)]
        if "rich" not in result["arguments"] or "short" in arm:  # its loss is that of other captions
            continue
        style = "--" if arm in dashed else "-"
        colour = PLOT_COLOURS[number % len(PLOT_COLOURS)]
        axes.plot(*mean_curve(by_seed), style, color=colour, label=arm)
    axes.legend(fontsize=8)
    save_plot(figure, path)


def plot_forgetting(found, starts, path: Path):
    """What was gained on `rich` against what was forgotten of `basic`."""
    base = found.get("base", {})
    figure, axes = new_plot(
        xlabel="forgotten: loss on basic, more than the base's",
        ylabel="learned: loss on rich, less than the base's",
    )
    points = []
    for number, (arm, by_seed) in enumerate(found.items()):
        if starts[arm] == "base" and base.keys() & by_seed.keys():
            forgotten = [-value for value in gains(by_seed, base, "basic")]
            learned = gains(by_seed, base, "rich")
            colour = PLOT_COLOURS[number % len(PLOT_COLOURS)]
            points.append((mean(learned), mean(forgotten), learned, forgotten, arm, colour))
    for i, (y, x, learned, forgotten, arm, colour) in enumerate(sorted(points)):
        bars = [stdev(values) if len(values) > 1 else 0 for values in (learned, forgotten)]
        axes.errorbar(x, y, *bars, "o", color=colour, capsize=2)
        offset = (5, 4) if i % 2 == 0 else (5, -11)  # neighbours have their names above and below
        axes.annotate(arm, (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=colour)
    save_plot(figure, path)


def rates_section(found) -> list[str]:
    """The last loss of each kind of further training, by learning rate."""
    rows = []
    for arm, by_seed in found.items():
        rows.append([arm, spread([measure(result, "last") for result in by_seed.values()], 4)])
    return ["## Learning rates", markdown_table(["kind, rate at width 128", "loss on rich"], rows)]


def plot_timing(found, targets, path: Path):
    """How much is saved, over the share of the budget that was spent before growth."""
    figure, axes = new_plot(
        xlabel="% of the budget spent on the small model",
        ylabel="times fewer FLOPs to the loss of the large one",
    )
    axes.axhline(1, color="grey", lw=1)
    shares = range(55, 101)
    axes.plot(shares, [100 / share for share in shares], ":", color="C0", label="at the moment of growth")
    for arm, by_seed in found.items():
        factors = [factor for factor in savings(by_seed, targets) if factor]
        share = re.search(r"at (\d+) %", arm)
        if share:
            axes.plot([int(share[1])] * len(factors), factors, "sC1" if "x 4" in arm else "oC0")
        elif factors:
            axes.axhline(mean(factors), color="C2", ls="--", label=f"{arm}: the small model")
    axes.plot([], [], "o", color="C0", label="twice the blocks")
    axes.plot([], [], "s", color="C1", label="four times")
    axes.legend()
    save_plot(figure, path)


def plot_scale(found, path: Path):
    """Loss over FLOPs of every budget: the curves part where the learning rate decays. A dotted line is where
    the final loss crosses that of never growing, mean over seeds."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", ylabel="loss on rich")
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    for number, arm in enumerate((NEVER, SCRATCH, HALFWAY)):
        colour = f"C{number}"
        budgets = [arms[arm] for arms in found.values() if arm in arms]
        for by_seed in budgets:
            draw_band(axes, by_seed, colour)
        if budgets:
            axes.plot([], [], color=colour, label=arm)
            axes.legend()
        seeds = {seed for by_seed in budgets for seed in by_seed}
        crossings = [crossing(found, arm, NEVER, seed) for seed in seeds]
        if arm != NEVER and crossings and all(crossings):
            axes.axvline(mean(crossings), color=colour, ls=":", lw=1)
    save_plot(figure, path)


def draw_band(axes, by_seed, colour):
    """The curve of an arm with one budget: mean and standard deviation over seeds, without the start."""
    curves = [loss_curve(result, "val_loss")[1:] for result in by_seed.values()]
    flops = [point[1] for point in curves[0]]
    losses = np.array([[point[2] for point in curve] for curve in curves])  # (seeds, points)
    middle, deviation = losses.mean(0), losses.std(0, ddof=len(losses) > 1)
    axes.plot(flops, middle, color=colour, lw=1)
    axes.fill_between(flops, middle - deviation, middle + deviation, color=colour, alpha=0.2, lw=0)
    axes.plot(flops[-1], middle[-1], "o", color=colour)


def plot_window(found, path: Path):
    """By how many per cent the final loss is lower than that of never growing, over the budget: growing pays
    where a line is above zero. The bars are the standard deviation over seeds."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", xscale="log")
    axes.set(ylabel=f"% lower final loss than {NEVER}")
    axes.axhline(0, color="grey", lw=1)
    arms = dict.fromkeys(arm for by_arm in found.values() for arm in by_arm)
    for number, arm in enumerate(arms):
        points = []
        for by_arm in found.values():
            small, mine = by_arm.get(NEVER, {}), by_arm.get(arm, {})
            seeds = sorted(small.keys() & mine.keys())
            values = [100 * (1 - measure(mine[s], "last") / measure(small[s], "last")) for s in seeds]
            if values:
                deviation = stdev(values) if len(values) > 1 else 0
                points.append((mine[seeds[0]]["flops"], mean(values), deviation))
        if points and arm not in (NEVER, EXTRA):
            style = {"color": PLOT_COLOURS[number], "ls": "--" if "plain" in arm else "-"}
            axes.errorbar(*zip(*points, strict=True), marker="o", ms=4, capsize=2, label=arm, **style)
            axes.legend(fontsize=7)
    save_plot(figure, path)


def draw_blocks(axes, by_seed, name, when, places):
    """A number of each block at its place in the grown model, mean and standard deviation over seeds; new
    blocks are hollow. by_seed: {seed: result} of one kind of checkpoint."""
    values = np.array([result[name] for result in by_seed.values()])  # (seeds, blocks)
    middle, deviation = values.mean(0), values.std(0, ddof=len(values) > 1)
    number = WHEN.index(when)
    colour = f"C{number}"
    beside = [place + 0.2 * (number - 1) for place in places]  # the three kinds stand side by side
    axes.errorbar(beside, middle, deviation, color=colour, capsize=2, ls="", label=when)
    for place, value, new in zip(beside, middle, next(iter(by_seed.values()))["new"], strict=True):
        axes.plot(place, value, "o", ms=5, color=colour, mfc="white" if new else colour)


def draw_column(column, found, where):
    """Importance and removal cost, before growth and of the models whose new blocks went `where`, one above
    the other. The blocks of the base stand where they are after growth."""
    grown = found.get((where, "after")) or found.get((where, "at growth"))
    if not grown:
        return
    new = next(iter(grown.values()))["new"]
    old_places = [place for place, is_new in enumerate(new) if not is_new]
    places = {"before": old_places, "at growth": range(len(new)), "after": range(len(new))}
    for axes, name in zip(column, ("importance", "cost"), strict=True):
        for when in WHEN:
            by_seed = found.get(("" if when == "before" else where, when))
            if by_seed:
                draw_blocks(axes, by_seed, name, when, places[when])
    column[0].set(title=where)
    column[0].legend(fontsize=8)
    column[1].set(xlabel="block")


def plot_blocks(found, path: Path):
    """What the blocks do, for models whose blocks were inserted, and for those that got them at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for axes, label in zip(grid[:, 0], ("importance", "removal cost"), strict=True):
        axes.set_yscale("symlog", linthresh=1e-4)  # straight below that: zero is a value too
        axes.set(ylabel=label)
    for column, where in zip(grid.T, ("insert", "suffix"), strict=True):
        draw_column(column, found, where)
    save_plot(figure, path)


# --------------------------------------------------------------------------------------------------------
# The report


# --------------------------------------------------------------------------------------------------------
# Complex prompts, over the FLOPs of training (lab/actors.py)


def actors_table(result) -> str:
    """The scores of the last point of a curve, and below them those of true clips of the same size."""
    rows = dict(result["points"][-1]["scores"])
    rows |= {f"true clips: {name}": scores for name, scores in result["ceiling"].items()}
    return score_table(rows)


def plot_actors(result, path: Path):
    """Accuracy over training FLOPs: each attribute of prompts of several actors, and everything at once by
    number of actors. A dotted line stands where the model was grown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points = result["points"]
    flops = [point["flops"] for point in points]
    scores = [point["scores"] for point in points]
    for name in SCORE_COLUMNS[:-1]:
        left.plot(flops, [sets["several actors"].get(name, math.nan) for sets in scores], "o-", label=name)
    for name in scores[0]:
        if name not in ("several actors", "long"):  # those are the means of two and three actors
            style = "o--" if name.startswith("long") else "o-"
            right.plot(flops, [sets[name]["all"] for sets in scores], style, label=name)
    left.set(title="Several actors: each attribute", ylabel="share that is right", ylim=(0, 1.02))
    right.set(title="Everything right, by number of actors")
    for axes in (left, right):
        axes.set(xlabel="FLOPs of training")
        for before, after in itertools.pairwise(points):
            if after["blocks"] != before["blocks"]:
                axes.axvline(before["flops"], color="grey", linestyle=":")
        axes.legend(fontsize=8)
    save_plot(figure, path)


def actors_section(folder: Path) -> list[str]:
    """A table and a picture of each curve in `folder`/actors."""
    text = []
    for file in sorted((folder / "actors").glob("*.json")):
        result = json.loads(file.read_text())
        plot_actors(result, folder / f"actors-{file.stem}.png")
        text += [f"## Complex prompts, and when they are learned: {file.stem}", actors_table(result)]
        text += [f"![Accuracy over FLOPs](actors-{file.stem}.png)", provenance([result])]
    return text


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


def read_scale(folder: Path) -> dict:
    """The results of lab/scale.py -> {budget: {arm: {seed: result}}}, in order."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = {}
    for result in sorted(results, key=lambda each: (each["budget"], each["arm"], each["seed"])):
        by_seed = found.setdefault(result["budget"], {}).setdefault(result["arm"], {})
        by_seed[result["seed"]] = result
    return found


def read_blocks(folder: Path) -> dict:
    """The results of lab/blocks.py -> {(where, when): {seed: result}}, in the order of life."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = {}
    for result in sorted(results, key=lambda each: (each["where"], WHEN.index(each["when"]), each["seed"])):
        found.setdefault((result["where"], result["when"]), {})[result["seed"]] = result
    return found


def provenance(results) -> str:
    """The commits and machines that the numbers are from."""
    sources = set()
    for result in results:
        revision = result["revision"]
        changed = "+" if revision.endswith("+") else ""
        sources.add(f"{revision[:10]}{changed} on {result['machine']}")
    return f"Measured at {'; '.join(sorted(sources))}."


def heading(results, parts) -> str:
    """Over which seeds the means are, and how many runs are missing."""
    seeds = sorted({result["seed"] for result in results})
    text = f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}."
    wanted = 0
    for arms in parts.values():
        wanted += 3 * sum(not arm.startswith("_") for arm in arms)
    if len(results) < wanted:
        text += f" Under way: {len(results)} of {wanted} runs are in."
    return text


def write_report(folder: Path, parts) -> str:
    """Make tables, pictures and verdicts of what is in `folder`/PART/*.json. The text is returned and written
    to README.md there. parts: {part: {arm: (the arm it continues from, options)}}. Raises FileNotFoundError
    if there are no results."""
    found = {part: read_part(folder / part, part, arms) for part, arms in parts.items()}
    results = [result for arms in found.values() for by_seed in arms.values() for result in by_seed.values()]
    scale = read_scale(folder / "scale")
    blocks = read_blocks(folder / "blocks")
    sources = [*results]
    for arms in (blocks, *scale.values()):
        for by_seed in arms.values():
            sources += by_seed.values()
    if not sources:
        raise FileNotFoundError(f"there are no results in {folder}: run `python -m lab.study` first")
    text = ["# Results", "Written by `python -m lab.study --report`."]
    if results:
        text.append(heading(results, parts))
    text.append(RULE)
    growth, language = found["growth"], found["language"]
    if growth:
        starts = {arm: start for arm, (start, _) in parts["growth"].items()}
        text += growth_section(growth, starts, folder)
    if found["timing"] and "large from scratch" in growth:
        text += timing_section(found["timing"], growth["large from scratch"], folder)
    if found["longer"]:
        text += longer_section(found["longer"], folder)
    if found["rates"]:
        text += rates_section(found["rates"])
    if found["table"]:
        text += ["## The paper's table", *claims(found["table"])]
        text += score_tables(found["table"], "dense continuation")
    if scale:
        text += scale_section(scale, folder)
    if blocks:
        text += blocks_section(blocks, folder)
    text += actors_section(folder)
    if language:
        text += ["## Language", *claims(language), *score_tables(language, "base encoder")]
        text += ["## Negative results of designs that were removed", NEGATIVE]
    reader = folder / "reader.json"
    if reader.is_file():
        text += ["## The reader", "What it reads of true clips:", score_table(json.loads(reader.read_text()))]
    if growth:
        text += growth_scores(growth)
    text.append(provenance(sources))
    report = "\n\n".join(text) + "\n"
    (folder / "README.md").write_text(report)
    return report
