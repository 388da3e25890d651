"""What the results of the study say: claims, the rule of a verdict, and the numbers that verdicts rest on.

A result is what a run left in results/PART/*.json. Differences between two arms are taken within each seed:
all arms of a seed see the same batches and noise, and most continue from the same base. The rule for a
verdict (`RULE`) was fixed before the runs. It is a weak test: if the mean of three values of a normal
distribution exceeds twice its standard error, all three have its sign, and without any effect that happens
with probability 1 - 2 / sqrt(6) = 0.18 (Student's t with two degrees of freedom).

Left out: significance tests and confidence intervals.
"""

import itertools
import math
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from lab.tables import SCORE_COLUMNS, spread

RULE = (
    "A claim *holds* if the difference is positive in every seed and its mean exceeds twice its standard"
    " error. It is *contradicted* if the same is true with the opposite sign. Otherwise it is *open*. A claim"
    " with several comparisons holds if all of them hold. It is contradicted if one of them is. Without any"
    " effect, about one comparison in five gets a verdict by chance (three seeds). *A over B* is the score of"
    " A minus that of B, or the loss of B minus that of A: positive if A is better. `basic` has clips of one"
    " actor, `rich` of one to three."
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
With the same further FLOPs the language model helps on long prompts of several actors.
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
    """The first step from which on the mean loss gap to another arm, over `window` entries of the curve, is
    negative; None if it is not at the end."""
    found = loss_gaps(result, reference)
    first = None
    for i in reversed(range(len(found) - window + 1)):
        if mean(gap for _, gap in found[i : i + window]) >= 0:
            break
        first = found[i][0]
    return first


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
# Verdicts on claims


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


class Judged(NamedTuple):
    """A claim with its verdict, and the gains that it rests on, in words."""

    claim: str
    verdict: str
    reasons: list[str]


def judge(found) -> list[Judged]:
    """The claims some of whose arms are there. A missing comparison leaves a claim open; a contradicted one
    decides it. found: {arm: {seed: result}}."""
    judged = []
    for claim, comparisons in read_claims().items():
        reasons, verdicts = [], []
        for better, worse, name in comparisons:
            values = gains(found.get(better, {}), found.get(worse, {}), name)
            verdicts.append(verdict(values))
            if values:
                reasons.append(f"*{better}* over *{worse}*, {name}: {spread(values, 4)} ({verdicts[-1]})")
        if reasons:
            decisive = next(v for v in ("contradicted", "open", "holds") if v in verdicts)
            judged.append(Judged(claim, decisive, reasons))
    return judged
