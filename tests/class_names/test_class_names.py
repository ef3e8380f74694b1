"""The class names of ImageNet: how many, which, in which order."""

import pytest

from vmoe.class_names import NAMES, class_names, synsets
from vmoe.errors import UsageError


@pytest.mark.parametrize(("name", "count"), [("imagenet_1k", 1_000), ("imagenet_21k", 21_843)])
def test_every_class_has_a_distinct_name(name: str, count: int) -> None:
    names = class_names(name)
    assert len(names) == len(set(names)) == count
    assert all(each and each == each.strip() and each.isascii() for each in names)


def test_known_classes_are_at_the_positions_of_the_published_logits() -> None:
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 817: "sports car"}
    known |= {950: "orange", 999: "toilet tissue"}
    assert {i: class_names("imagenet_1k")[i] for i in known} == known
    known = {0: "organism", 1: "benthos", 2: "heterotroph", 21_842: "knothole"}
    assert {i: class_names("imagenet_21k")[i] for i in known} == known


def test_classes_with_the_same_first_lemma_are_told_apart_by_all_lemmas_or_the_synset() -> None:
    names = class_names("imagenet_1k")
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert (names[638], names[639]) == ("maillot", "maillot, tank suit")
    assert sum(name.endswith(")") for name in names) == 2


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_in_the_order_of_their_synsets(name: str) -> None:
    assert list(synsets(name)) == sorted(set(synsets(name)))


def test_the_21k_classes_hold_all_1k_classes_but_the_teddy() -> None:
    (missing,) = set(synsets("imagenet_1k")) - set(synsets("imagenet_21k"))
    assert class_names("imagenet_1k")[synsets("imagenet_1k").index(missing)] == "teddy"


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no class names of 'imagenet_22k': did you mean"):
        class_names("imagenet_22k")
