"""The generated sections of the pages in docs/results that rest on the models of the claims."""

from collections.abc import Sequence

import numpy as np

from scripts.experiments.claims.design import power
from scripts.experiments.claims.measure import LOW
from scripts.experiments.claims.observations import CAPACITY, SPECIALIZATION, observations
from scripts.experiments.claims.tables import (
    DIFFERENCE,
    attacked,
    blocks,
    changed,
    claims,
    comparisons,
    counts,
    difference,
    kept,
    mean,
    meanings,
    models,
    not_checked,
    slots,
)
from scripts.experiments.claims.variants import BATCH_SIZE, STEPS
from scripts.experiments.claims.verdicts import (
    CLAIMS,
    KEPT,
    NOT_MEASURED,
    PAGES,
    ROUTERS_COMPARED,
    Findings,
    Recipes,
    judge,
)
from scripts.experiments.framework.differences import p_value, signed
from scripts.experiments.framework.pages import answer, jax_versions, markdown_table, wrapped
from scripts.experiments.framework.runs import Rows

BETWEEN = {"above": " better than ", "below": " worse than "}
UNCLEAR = "cannot tell"
ANSWERS = {"reproduced": "**yes**", "inconclusive": UNCLEAR, "contradicted": "**no**"}


def sections(rows: Rows, recipes: Recipes, machine: str) -> dict[str, dict[str, str]]:
    """The generated sections of each page by name.

    Args:
        machine: where and when the rows were made.
    """
    found = judge(rows, recipes)
    made = {
        page: own | {"how": how(rows, machine)}
        for page, own in _sections(rows, found, recipes).items()
    }
    return made | {"README.md": {"claims": counts(found)}}


def _sections(rows: Rows, found: Findings, recipes: Recipes) -> dict[str, dict[str, str]]:
    return {
        "sparse_or_dense.md": {
            "answer": _sparse_or_dense(found, recipes),
            "recipes": recipes_table(found, recipes),
            "comparisons": comparisons(rows, found, PAGES["sparse_or_dense"]),
        },
        **{
            f"{page}.md": {
                "answer": answer(
                    [_relations(found, names)],
                    [f"{_pair(name, ' against ')}: {difference(found, name)}" for name in names],
                ),
                "comparisons": comparisons(rows, found, PAGES[page]),
            }
            for page, names in {"design": PAGES["design"], "routers": ROUTERS_COMPARED}.items()
        },
        "capacity.md": {
            "answer": answer(
                [
                    f"after training: {_says(found, 'order.standard')}",
                    f"in training at capacity factor 0.5: {_says(found, 'half')}",
                ],
                [
                    f"accuracy with {LOW} slots per expert (capacity factor 0.25): largest gate "
                    f"first {_slots(rows, 'largest_gate')}",
                    f"in order {_slots(rows, 'order')}; at random {_slots(rows, 'random')}",
                ],
            ),
            "comparisons": comparisons(rows, found, {*PAGES["capacity"]} - {*KEPT}),
            "kept": comparisons(rows, found, KEPT),
            "observations": observations(rows, CAPACITY),
        },
        "specialization.md": {
            "answer": answer(
                [
                    f"by position, more in early blocks: {_says(found, 'position')}",
                    f"by class, more in late blocks: {_says(found, 'class')}",
                ],
                [
                    f"information on the {kind}: {_information(rows, kind, 1)} in block 1, "
                    f"{_information(rows, kind, 5)} in block 5"
                    for kind in ("position", "class")
                ],
            ),
            "comparisons": comparisons(rows, found, PAGES["specialization"]),
            "observations": observations(rows, SPECIALIZATION),
        },
        "attacks.md": {
            "answer": answer(
                [
                    f"{attack}: at equal steps {_says(found, f'{name}.dense')}, "
                    f"at equal training FLOPs {_says(found, f'{name}.dense_flops')}"
                    for name, attack in {
                        "attack.8": "published attack",
                        "attack.8.projected": "projected steps",
                    }.items()
                ],
                [
                    "accuracy under the published attack by 8/255: V-MoE "
                    f"{mean(rows, 'standard', 'attack.8')}",
                    f"dense {mean(rows, 'dense', 'attack.8')} (equal steps), "
                    f"{mean(rows, 'dense_flops', 'attack.8')} (equal FLOPs)",
                ],
            ),
            "comparisons": comparisons(rows, found, PAGES["attacks"]),
        },
        "batch.md": {"changed": changed(rows)},
        "claims.md": {
            "counts": counts(found),
            "claims": claims(rows, found),
            "meanings": meanings(found),
            "not checked": not_checked(),
            "power": power(rows, recipes),
        },
        "models.md": {
            "models": models(rows),
            "attacked": attacked(rows),
            "slots": slots(rows),
            "kept": kept(rows),
            "blocks": blocks(rows),
        },
    }


def how(rows: Rows, machine: str) -> str:
    """How the rows were made."""
    every = [row for of in rows.values() for row in of.values()]
    text = f"""`python -m scripts.experiments claims`: {len(rows)} models, {len(every)} runs,
        {machine}, {jax_versions(rows)}. Short training on Fashion-MNIST: {STEPS:,} steps of
        {BATCH_SIZE} images, otherwise the config `fashion_mnist`. Nothing was chosen on the test
        split. Accuracies are means over seeds, in percent, with the worst and the best seed in
        parentheses. After ± is the standard error of a difference, over the seeds and over the test
        images. p is that of a t-test, corrected for the number of tests of the page
        ([rule](claims.md#the-rule)). Differences are computed from means that are not rounded."""
    return wrapped(text)


def _sparse_or_dense(found: Findings, recipes: Recipes) -> str:
    words = [
        f"short training on Fashion-MNIST ({STEPS:,} steps of {BATCH_SIZE} images): "
        f"at equal steps {_says(found, 'dense')}, at equal training FLOPs "
        f"{_says(found, 'dense_flops')}"
    ]
    numbers = [
        f"V-MoE − dense: short training, equal steps {difference(found, 'dense')}",
        f"short training, equal FLOPs {difference(found, 'dense_flops')}",
    ]
    for recipe in recipes:
        name = recipe["config"]
        length = f" ({recipe['length']})" if "length" in recipe else ""
        own = found.recipes[name]
        text = UNCLEAR if not own.clear else "**yes**" if own.mean > 0 else "**no**"
        words.append(f"config `{name}`{length}: {text}")
        numbers.append(f"config `{name}` {_of_recipe(found, name)}")
    return answer(words, numbers)


def _of_recipe(found: Findings, name: str) -> str:
    own = found.recipes[name]
    return signed(own, bound=True)


def recipes_table(found: Findings, recipes: Recipes) -> str:
    """The runs of the configs with a dense counterpart."""
    lines = [
        [
            f"{recipe['data']}, `{recipe['config']}`, `{recipe['config']}_dense`",
            *(
                f"{np.mean(recipe[key]):.2f} ({', '.join(f'{x:.2f}' for x in recipe[key])})"
                for key in ("sparse", "dense")
            ),
            _of_recipe(found, recipe["config"]),
            p_value(found.recipes[recipe["config"]].p),
            recipe["machine"],
        ]
        for recipe in recipes
    ]
    columns = ["data, configs", "A: V-MoE", "B: dense", *DIFFERENCE, "machine, date"]
    return markdown_table(columns, lines)


def _information(rows: Rows, kind: str, block: int) -> str:
    return mean(rows, "standard", f"{kind}.{block}", 1, 3)


def _slots(rows: Rows, priority: str) -> str:
    return mean(rows, "standard", f"capacity.{LOW}.{priority}")


def _says(found: Findings, name: str) -> str:
    """The answer to a claim of an order."""
    own = found.claims.get(name)
    return ANSWERS[own.verdict] if own else NOT_MEASURED


def _relations(found: Findings, names: Sequence[str]) -> str:
    """How the two figures of each claim compare, in words."""
    groups: dict[str, list[str]] = {
        "Clear: ": [],
        "Cannot be told apart: ": [],
        "Not measured: ": [],
    }
    clear, unclear, missing = groups.values()
    for name in names:
        if name not in found.claims:
            missing.append(_pair(name, " and "))
        elif (relation := found.claims[name].order) != "none":
            clear.append(_pair(name, BETWEEN[relation]))
        else:
            unclear.append(_pair(name, " and "))
    return ". ".join(f"{title}{'; '.join(each)}" for title, each in groups.items() if each)


def _pair(name: str, between: str) -> str:
    """Both labels of a claim; a word that both end with stands once."""
    first, second = CLAIMS[name].labels
    if between == " and ":
        return f"{first.removesuffix(' experts')}{between}{second}"
    return f"{first}{between}{second.removesuffix(' experts')}"
