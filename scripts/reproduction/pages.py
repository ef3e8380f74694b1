"""The generated sections of the pages in docs/results that rest on the small reproduction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from experiments import Rows, jax_versions, markdown_table

from reproduction.claims import (
    CLAIMS,
    NOT_MEASURED,
    SEEDS_ALONE,
    error_over_seeds,
    found,
    order,
    verdict,
)
from reproduction.measure import LOW
from reproduction.observations import CAPACITY, SPECIALIZATION, observations
from reproduction.show import (
    attacked,
    blocks,
    changed,
    claims,
    comparisons,
    counts,
    difference,
    kept,
    mean,
    models,
    narrow,
    not_checked,
    slots,
    wrapped,
)
from reproduction.variants import BATCH_SIZE

SIGNS = {"above": ">", "below": "<", "none": "≈"}
ANSWERS = {
    "reproduced": "**yes**",
    "not contradicted": "**yes**",
    "inconclusive": "cannot tell",
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
    pages = _sections(rows, recipes)
    made = {page: {**own, "how": how(rows, machine)} for page, own in pages.items()}
    return made | {"README.md": {"claims": counts(rows)}}


def _sections(rows: Rows, recipes: Recipes) -> dict[str, dict[str, str]]:
    design = ("e16", "e4", "k1", "last2")
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
                [_relation(rows, name) for name in design],
                [difference(rows, CLAIMS[name]) for name in design],
            ),
            "comparisons": comparisons(rows, design),
        },
        "routers.md": {
            "answer": answer(
                [_relation(rows, name) for name in ("expert_choice", "soft")],
                [
                    f"token choice {mean(rows, 'standard', 'accuracy')}",
                    f"expert choice {mean(rows, 'expert_choice', 'accuracy')}",
                    f"soft {mean(rows, 'soft', 'accuracy')}",
                ],
            ),
            "comparisons": comparisons(rows, ("expert_choice", "soft", "soft_expert_choice")),
        },
        "capacity.md": {
            "answer": answer(
                [
                    f"after training: {_says(rows, 'order.standard')}",
                    f"in training at capacity factor 0.5: {_says(rows, 'half')}",
                ],
                [
                    f"{LOW} slots per expert: {_slots(rows, 'largest_gate')} largest gate first",
                    f"{_slots(rows, 'order')} in order; {_slots(rows, 'random')} at random",
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
                    f"{attack}: {_says(rows, f'{name}.dense')} at equal steps, "
                    f"{_says(rows, f'{name}.dense_flops')} at equal training FLOPs"
                    for name, attack in {
                        "attack.8": "published attack",
                        "attack.8.projected": "projected steps",
                    }.items()
                ],
                [
                    f"attacked by 8/255: V-MoE {mean(rows, 'standard', 'attack.8')}",
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
    """How the rows were made, and what is wrong with them."""
    every = [row for of in rows.values() for row in of.values()]
    text = f"""`python scripts/reproduce_small.py`: {len(rows)} models, {len(every)} runs,
        {machine}, {jax_versions(rows)}. Fashion-MNIST, batches of {BATCH_SIZE}, otherwise the
        config `fashion_mnist`. Nothing was chosen on the test split. Accuracies are means over
        seeds, in percent, with the worst and the best seed in parentheses. After ± is the standard
        error of a difference over the seeds; after a second ± over the test images, paired."""
    paragraphs = [wrapped(" ".join(text.split()))]
    if old := sum("order" not in row for row in every):
        text = f"""**To be measured again:** {old} of the {len(every)} runs were evaluated in the
            order of the files (classes are mixed there), and without results for each image, so
            their differences have no error over the images. vmoe now evaluates in a shuffled order;
            that moved the accuracy of the packaged Fashion-MNIST model by 0.01 points."""
        paragraphs.append(wrapped(" ".join(text.split())))
    return "\n\n".join(paragraphs)


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
        f"Fashion-MNIST: {_says(rows, 'dense')} at equal steps, {_says(rows, 'dense_flops')} at "
        "equal training FLOPs"
    ]
    numbers = [
        f"equal steps {difference(rows, CLAIMS['dense'])}",
        f"equal FLOPs {difference(rows, CLAIMS['dense_flops'])}",
    ]
    for recipe in recipes:
        above = order(recipe["sparse"], recipe["dense"], paired=False)
        word = {"above": "**yes**", "below": "**no**", "none": "cannot tell"}[above]
        words.append(f"config `{recipe['config']}`: {word}")
        numbers.append(f"`{recipe['config']}` {_difference(recipe)}")
    return answer(words, numbers)


def _difference(recipe: Mapping[str, Any]) -> str:
    sparse, dense = (np.array(recipe[key]) for key in ("sparse", "dense"))
    error = error_over_seeds(sparse, dense, paired=False)
    return f"{sparse.mean() - dense.mean():+.2f} ± {error:.2f}"


def recipes_table(recipes: Recipes) -> str:
    """The runs of the configs with a dense counterpart."""
    lines = [
        [
            f"{recipe['data']}, `{recipe['config']}`, `{recipe['config']}_dense`",
            *(f"{np.mean(own):.2f} ({', '.join(f'{x:.2f}' for x in own)})" for own in accuracies),
            _difference(recipe),
            recipe["machine"],
        ]
        for recipe in recipes
        for accuracies in [(recipe["sparse"], recipe["dense"])]
    ]
    columns = ["data, configs", "A: V-MoE", "B: dense", "A − B", "machine, date"]
    return markdown_table(columns, lines)


def _information(rows: Rows, kind: str, block: int) -> str:
    return mean(rows, "standard", f"{kind}.{block}", 1, 3)


def _slots(rows: Rows, priority: str) -> str:
    return mean(rows, "standard", f"capacity.{LOW}.{priority}")


def _says(rows: Rows, name: str) -> str:
    return ANSWERS[verdict(CLAIMS[name], rows).removesuffix(SEEDS_ALONE)]


def _relation(rows: Rows, name: str) -> str:
    """How the two figures of a claim compare, in a few words."""
    claim = CLAIMS[name]
    first, second = claim.labels
    if second.endswith(" experts"):
        first = first.removesuffix(" experts")
    if verdict(claim, rows) == NOT_MEASURED:
        return f"{first} and {second}: {NOT_MEASURED}"
    return f"{first} {SIGNS[found(claim, rows)]} {second}"
