"""The design of the runs, decided before the first of them: what pages show, and what tests find.

Twelve seeds are planned where three left most claims inconclusive. Pages show the first three until
all planned ones are there, so that no seed was added because of a verdict.
"""

from scripts.experiments.claims.tables import measured, units
from scripts.experiments.claims.variants import VARIANTS
from scripts.experiments.claims.verdicts import CLAIMS, PAGES, Recipes, margin
from scripts.experiments.framework.differences import LEVEL
from scripts.experiments.framework.pages import markdown_table
from scripts.experiments.framework.runs import SEEDS, Rows


def first(rows: Rows) -> Rows:
    """The rows of the first three seeds."""
    return {
        name: {seed: row for seed, row in rows[name].items() if seed in SEEDS}
        for name in measured(rows, VARIANTS)
    }


def shown(rows: Rows) -> Rows:
    """The rows that pages show: the planned ones once all are there, before that the first."""
    planned = {name: range(variant.seeds) for name, variant in VARIANTS.items()}
    if any(set(seeds) - rows.get(name, {}).keys() for name, seeds in planned.items()):
        return first(rows)
    return {name: {seed: rows[name][seed] for seed in seeds} for name, seeds in planned.items()}


def power(rows: Rows, recipes: Recipes) -> str:
    """What tests of the planned seeds find, by the variances of the first three.

    Args:
        recipes: their tests count on a page, too.
    """
    rows, lines = first(rows), []
    for page, names in PAGES.items():
        tests = sum(1 + (CLAIMS[name].says != "above") for name in names)
        tests += len(recipes) * (page == "sparse_or_dense")
        for name in names:
            claim = CLAIMS[name]
            seeds = [VARIANTS[each.variant].seeds for each in (claim.first, claim.second)]
            found, _ = margin(claim, rows, seeds)
            sides, (scale, digits) = 1 + (claim.says == "above"), units(claim.first)
            figures = (found.error, *(found.found_from(LEVEL / m, sides) for m in (1, tests)))
            words = [f"{scale * figure:.{digits}f}" for figure in figures]
            text = f"[{page}]({page}.md), {tests}"
            lines.append([claim.text, text, " and ".join(dict.fromkeys(map(str, seeds))), *words])
    columns = ["claim", "page, tests", "seeds", "error", "found from", "strictest"]
    return markdown_table(columns, lines)
