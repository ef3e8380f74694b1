"""The generated sections of the pages in docs/results that rest on the small reproduction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from experiments import Rows, jax_versions, markdown_table

from reproduction.claims import (
    CLAIMS,
    ERRORS,
    NOT_MEASURED,
    error_bound,
    error_over_seeds,
    found,
    order,
    order_of_seeds,
    seeds_agree,
    verdict,
    word,
)
from reproduction.measure import LOW
from reproduction.observations import CAPACITY, SPECIALIZATION, observations
from reproduction.show import (
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
    narrow,
    not_checked,
    slots,
    wrapped,
)
from reproduction.variants import BATCH_SIZE, STEPS, VARIANTS

BETWEEN = {"above": " better than ", "below": " worse than "}
UNCLEAR = "cannot tell"
TOO_FEW = f"{UNCLEAR} (yes by the seeds alone)"
ANSWERS = {
    "reproduced": "**yes**",
    "not contradicted": "**yes**",
    "inconclusive": UNCLEAR,
    "contradicted": "**no**",
    NOT_MEASURED: NOT_MEASURED,
}
Recipes = Sequence[Mapping[str, Any]]
"""Runs of the configs with a dense counterpart, as in scripts/rows/recipes.json."""


def sections(rows: Rows, recipes: Recipes, machine: str) -> dict[str, dict[str, str]]:
    """The generated sections of each page by name.

    Args:
        machine: where and when the rows were made.
    """
    made = {
        page: own | {"how": how(rows, machine)} for page, own in _sections(rows, recipes).items()
    }
    return made | {"README.md": {"claims": counts(rows)}}


def _sections(rows: Rows, recipes: Recipes) -> dict[str, dict[str, str]]:
    design = ("e16", "e4", "k1", "last2")
    routers = ("expert_choice", "soft", "bias_balanced", "cosine", "hash", "shared")
    differ = [
        name
        for name in routers
        if verdict(CLAIMS[name], rows) != NOT_MEASURED and found(CLAIMS[name], rows) != "none"
    ]
    attacks = [name for name in CLAIMS if name.startswith("attack")]
    priorities = [name for name in CLAIMS if name.startswith(("order", "random."))]
    return {
        "sparse_or_dense.md": {
            "answer": _sparse_or_dense(rows, recipes),
            "recipes": recipes_table(recipes),
            "comparisons": comparisons(rows, ("dense", "dense_flops")),
        },
        "design.md": {
            "answer": answer(
                [_relations(rows, design)],
                [
                    f"{_pair(name, ' against ')}: {difference(rows, CLAIMS[name])}"
                    for name in design
                ],
            ),
            "comparisons": comparisons(rows, design),
        },
        "routers.md": {
            "answer": answer(
                [_relations(rows, routers)],
                [
                    f"accuracy: token choice {mean(rows, 'standard', 'accuracy')}",
                    *(
                        f"{VARIANTS[name].label} {mean(rows, name, 'accuracy')}"
                        for name in (*differ, "dense", "dense_flops")
                        if rows.get(name)
                    ),
                ],
            ),
            "comparisons": comparisons(rows, (*routers, "soft_expert_choice")),
        },
        "capacity.md": {
            "answer": answer(
                [
                    f"after training: {_says(rows, 'order.standard')}",
                    f"in training at capacity factor 0.5: {_says(rows, 'half')}",
                ],
                [
                    f"accuracy with {LOW} slots per expert (capacity factor 0.25): largest gate "
                    f"first {_slots(rows, 'largest_gate')}",
                    f"in order {_slots(rows, 'order')}; at random {_slots(rows, 'random')}",
                ],
            ),
            "comparisons": comparisons(rows, [*priorities, "sum_of_gates", "half_bpr", "half"]),
            "kept": comparisons(rows, ("background.1", "background.5")),
            "observations": observations(rows, CAPACITY),
        },
        "specialization.md": {
            "answer": answer(
                [
                    f"by position, more in early blocks: {_says(rows, 'position')}",
                    f"by class, more in late blocks: {_says(rows, 'class')}",
                ],
                [
                    f"information on the {kind}: {_information(rows, kind, 1)} in block 1, "
                    f"{_information(rows, kind, 5)} in block 5"
                    for kind in ("position", "class")
                ],
            ),
            "comparisons": comparisons(rows, ("class", "position", "random_router", "averaged")),
            "observations": observations(rows, SPECIALIZATION),
        },
        "attacks.md": {
            "answer": answer(
                [
                    f"{attack}: at equal steps {_says(rows, f'{name}.dense')}, "
                    f"at equal training FLOPs {_says(rows, f'{name}.dense_flops')}"
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
            "comparisons": comparisons(rows, [*attacks, "experts_weak"]),
        },
        "batch.md": {"changed": changed(rows)},
        "claims.md": {
            "counts": counts(rows),
            "claims": claims(rows),
            "meanings": meanings(rows),
            "narrow": narrow(rows),
            "not checked": not_checked(),
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
    text = f"""`python scripts/reproduce_small.py`: {len(rows)} models, {len(every)} runs,
        {machine}, {jax_versions(rows)}. Short training on Fashion-MNIST: {STEPS:,} steps of
        {BATCH_SIZE} images, otherwise the config `fashion_mnist`. Nothing was chosen on the test
        split. Accuracies are means over seeds, in percent, with the worst and the best seed in
        parentheses. After ± is the standard error of a difference over the seeds. Differences are
        computed from means that are not rounded."""
    return wrapped(" ".join(text.split()))


def answer(parts: Sequence[str], numbers: Sequence[str]) -> str:
    """The paragraphs that the page of answers repeats."""
    words = "; ".join(parts)
    return "\n\n".join(
        wrapped(f"**{title}:** {text}")
        for title, text in {
            "Answer": words[:1].upper() + words[1:] + ".",
            "Numbers": "; ".join(numbers) + ".",
        }.items()
    )


def _sparse_or_dense(rows: Rows, recipes: Recipes) -> str:
    words = [
        f"short training on Fashion-MNIST ({STEPS:,} steps of {BATCH_SIZE} images): "
        f"at equal steps {_says(rows, 'dense')}, at equal training FLOPs "
        f"{_says(rows, 'dense_flops')}"
    ]
    numbers = [
        f"V-MoE − dense: short training, equal steps {difference(rows, CLAIMS['dense'])}",
        f"short training, equal FLOPs {difference(rows, CLAIMS['dense_flops'])}",
    ]
    for recipe in recipes:
        length = f" ({recipe['length']})" if "length" in recipe else ""
        words.append(f"config `{recipe['config']}`{length}: {_says_recipe(recipe)}")
        numbers.append(f"config `{recipe['config']}` {_difference(recipe)}")
    return answer(words, numbers)


def _says_recipe(recipe: Mapping[str, Any]) -> str:
    """The answer of a config, by the rule for claims without results per image."""
    sparse, dense = (np.array(recipe[key]) / 100 for key in ("sparse", "dense"))
    by_seeds = order(sparse, dense, paired=False)
    if by_seeds == "none" or 100 * abs(sparse.mean() - dense.mean()) >= ERRORS * _bound(recipe):
        return {"above": "**yes**", "below": "**no**", "none": UNCLEAR}[by_seeds]
    return TOO_FEW if by_seeds == "above" else UNCLEAR


def _difference(recipe: Mapping[str, Any]) -> str:
    sparse, dense = (np.array(recipe[key]) for key in ("sparse", "dense"))
    error = error_over_seeds(sparse, dense, paired=False)
    return f"{sparse.mean() - dense.mean():+.2f} ± {error:.2f}"


def _bound(recipe: Mapping[str, Any]) -> float:
    """The bound of the error over the images, in points."""
    accuracies = (np.mean(recipe[key]) / 100 for key in ("sparse", "dense"))
    return 100 * error_bound(*accuracies, recipe["images"])


def recipes_table(recipes: Recipes) -> str:
    """The runs of the configs with a dense counterpart."""
    lines = [
        [
            f"{recipe['data']}, `{recipe['config']}`, `{recipe['config']}_dense`",
            *(f"{np.mean(own):.2f} ({', '.join(f'{x:.2f}' for x in own)})" for own in accuracies),
            _difference(recipe),
            f"at most {_bound(recipe):.2f}",
            recipe["machine"],
        ]
        for recipe in recipes
        for accuracies in [(recipe["sparse"], recipe["dense"])]
    ]
    columns = ["data, configs", "A: V-MoE", "B: dense", *DIFFERENCE, "machine, date"]
    return markdown_table(columns, lines)


def _information(rows: Rows, kind: str, block: int) -> str:
    return mean(rows, "standard", f"{kind}.{block}", 1, 3)


def _slots(rows: Rows, priority: str) -> str:
    return mean(rows, "standard", f"capacity.{LOW}.{priority}")


def _says(rows: Rows, name: str) -> str:
    text = word(verdict(CLAIMS[name], rows))
    if text == "inconclusive" and seeds_agree(CLAIMS[name], rows):
        return TOO_FEW
    return ANSWERS[text]


def _relations(rows: Rows, names: Sequence[str]) -> str:
    """How the two figures of each claim compare, in words."""
    groups: dict[str, list[str]] = {
        "Clear: ": [],
        "By the seeds alone, which is not enough: ": [],
        "Cannot be told apart: ": [],
        "Not measured: ": [],
    }
    clear, by_seeds, unclear, missing = groups.values()
    for name in names:
        claim = CLAIMS[name]
        if verdict(claim, rows) == NOT_MEASURED:
            missing.append(_pair(name, " and "))
        elif (relation := found(claim, rows)) != "none":
            clear.append(_pair(name, BETWEEN[relation]))
        elif (relation := order_of_seeds(claim, rows)) != "none":
            by_seeds.append(_pair(name, BETWEEN[relation]))
        else:
            unclear.append(_pair(name, " and "))
    return ". ".join(f"{title}{'; '.join(each)}" for title, each in groups.items() if each)


def _pair(name: str, between: str) -> str:
    """Both labels of a claim; a word that both end with stands once."""
    first, second = CLAIMS[name].labels
    if between == " and ":
        return f"{first.removesuffix(' experts')}{between}{second}"
    return f"{first}{between}{second.removesuffix(' experts')}"
