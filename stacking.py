"""Where new blocks go: the stacking plan of ModelGrow (arXiv 2412.18966, figure 3).

grow.py uses it for models of this project, and has a picture; grow_diffusers.py uses it for checkpoints on
disk. Left out: stacking whole models on top of each other (G_stack, arXiv 2405.15319), and plans that depend
on the weights.
"""

WHERE = ("insert", "prefix", "suffix")  # where copied blocks go


def stacking_plan(depth, add, group=None, where="insert") -> list[tuple[int, bool]]:
    """The grown stack of figure 3, in order: (index of the block in the base, is it a new copy?). `depth` is
    N, `add` is P, `group` is M. There are N // M groups of at least M blocks. Their sizes differ by one at
    most, and the larger groups come first. Without M there are min(N, P) groups, and their numbers of copies
    differ by one at most:

        N = 4, P = 6:    0 0' 0' 1 1' 1' 2 2' 3 3'

    Where P divides N, this is the rule of LLaMA-Pro (arXiv 2401.02415). Raises ValueError where groups of M
    cannot share P copies evenly."""
    if where not in WHERE:
        raise ValueError(f"no stacking is called {where!r}; there are {', '.join(WHERE)}")
    if not 1 <= add <= 1024:
        raise ValueError(f"cannot add {add} blocks; it must be from 1 to 1024")
    if group is not None and where != "insert":
        raise ValueError(f"{where} stacking has no groups; group is for insert")
    old = [(i, False) for i in range(depth)]
    if where == "prefix":
        return [(0, True)] * add + old
    if where == "suffix":
        return old + [(depth - 1, True)] * add
    if group is not None and not 1 <= group <= depth:
        raise ValueError(f"cannot cut {depth} blocks into groups of {group}")
    groups = depth // group if group else min(add, depth)
    if group and add % groups:
        raise ValueError(f"{groups} groups of blocks cannot share {add} copies evenly: add a multiple")
    plan = []
    start = 0
    for i in range(groups):
        end = start + depth // groups + (i < depth % groups)
        copies = add // groups + (i < add % groups)
        plan += old[start:end] + [(end - 1, True)] * copies
        start = end
    return plan
