"""Metrics of an evaluation, and predictions for image files."""

import csv
import dataclasses
import functools
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from PIL import Image

import vmoe
from tests.command import without_times
from tests.random_models import forward, outputs
from tests.routers import grouped
from vmoe.config import (
    DataConfig,
    ExpertChoice,
    OptimConfig,
    Router,
    RoutingOverrides,
    Soft,
    TokenChoice,
    TrainConfig,
    replace,
)
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.data.crops import resize_and_crop
from vmoe.data.pipeline import evaluation_order
from vmoe.data.reading import Reading
from vmoe.data.sources import Example, Fingerprint, Source, open_source, sample
from vmoe.data.sources.source import Skipped
from vmoe.errors import Failure, UsageError
from vmoe.evaluate import (
    Evaluation,
    NamedEvaluation,
    evaluate,
    image_files,
    paired_difference,
    predict,
)
from vmoe.evaluate.metrics import PerExample, calibration_error, confusion
from vmoe.evaluate.sample import Sample
from vmoe.evaluate.table import append_row, per_class, summary
from vmoe.factory import Loaded, Origin
from vmoe.health import findings
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT
from vmoe.train import train
from vmoe.train.report import Report

DENSE = dict(image_size=8, patch_size=4, depth=1)


def model(blocks: int = 1, *, seed: int = 0, **moe: object) -> ViT:
    """A model all of whose blocks are sparse; dropless unless ``moe`` says otherwise."""
    fields = DENSE | dict(depth=blocks, sparse_blocks=tuple(range(blocks)), head_std=1.0)
    fields["moe"] = moe or dict(router=dict(dropless=True))
    return vmoe.create_model("vmoe_test_last2_e4", seed=seed, **fields)


def test_metrics_equal_numpy_and_scikit_learn_at_any_batch_size() -> None:
    source, net = open_source("digits", "test"), model()
    logits = logits_of(net, source.images)
    correct = logits.argmax(1) == source.labels
    log_probability = scipy.special.log_softmax(logits, axis=1)[np.arange(360), source.labels]
    for batch_size in (7, 256):
        result = evaluate(net, source, Reading(batch_size))
        assert result.images == 360 and result.dropped == 0
        assert result.accuracy == pytest.approx(correct.mean())
        assert result.cross_entropy == pytest.approx(-log_probability.mean(), rel=1e-5)
        top5 = sklearn.metrics.top_k_accuracy_score(source.labels, logits, k=5)
        assert result.top5_accuracy == pytest.approx(top5)
        p = scipy.special.softmax(logits, axis=1)
        brier = ((p - np.eye(10)[source.labels]) ** 2).sum(1).mean()
        assert result.brier == pytest.approx(brier, rel=1e-5)
        assert result.calibration_error == pytest.approx(
            calibration_error_by_loop(p.max(1), correct), abs=1e-5
        )
        ours = confusion(result.per_example, 10).toarray()[:, :10]
        theirs = sklearn.metrics.confusion_matrix(source.labels, logits.argmax(1))
        np.testing.assert_array_equal(ours, theirs)
        table = per_class(result)
        recall = sklearn.metrics.recall_score(source.labels, logits.argmax(1), average=None)
        assert [row["accuracy"] for row in table.values()] == pytest.approx(list(recall))
        assert sum(row["images"] for row in table.values()) == 360


def logits_of(net: ViT, images: np.ndarray) -> np.ndarray:
    return np.asarray(outputs(net, to_float(images)), np.float64)


def calibration_error_by_loop(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The calibration error, one bin at a time."""
    total = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & (confidence < (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_a_confident_and_correct_model_has_no_calibration_error() -> None:
    assert calibration_error(np.ones(7), np.ones(7, bool)) == 0
    assert calibration_error(np.ones(8), np.arange(8) < 6) == pytest.approx(0.25)


def test_the_calibration_error_equals_a_loop_over_bins() -> None:
    """Bins in which too few and too many are right: only bins of the same edges agree."""
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.5
    expected = calibration_error_by_loop(confidence, correct)
    assert calibration_error(confidence, correct) == pytest.approx(expected)


@functools.cache
def fashion_mnist(kind: str) -> Evaluation:
    """The evaluation of a model that comes with the package on the sample of its data."""
    model = vmoe.load(f"{kind}_fashion_mnist").model
    return evaluate(model, open_source("fashion_mnist_sample", "test"))


def test_two_models_are_compared_image_by_image() -> None:
    """The oracle of the standard errors is SciPy."""
    source = open_source("fashion_mnist_sample", "test")
    sparse, dense = fashion_mnist("vmoe"), fashion_mnist("vit")
    right = [
        (each.per_example.predictions == source.labels).astype(int) for each in (sparse, dense)
    ]
    for result, own in zip((sparse, dense), right, strict=True):
        assert result.standard_error == pytest.approx(scipy.stats.sem(own))
    accuracy, error = paired_difference(sparse, dense)
    assert accuracy == pytest.approx(sparse.accuracy - dense.accuracy) and accuracy > 0
    assert error == pytest.approx(scipy.stats.sem(right[0] - right[1]))
    assert error < np.hypot(sparse.standard_error, dense.standard_error)
    fewer = evaluate(vmoe.load("vmoe_fashion_mnist").model, sample(source, 100))
    with pytest.raises(UsageError, match="the labels differ, evaluate the same images"):
        paired_difference(sparse, fewer)
    # another image of the same class could not be read
    parts = [
        dataclasses.replace(sparse, indices=np.delete(np.arange(513), missing))
        for missing in (3, 9)
    ]
    with pytest.raises(UsageError, match="the indices of the images differ, evaluate the same"):
        paired_difference(*parts)


def test_two_drawings_of_an_emoji_are_one_observation() -> None:
    """The oracle is SciPy on the sums of each emoji; the sample has 24 emoji twice."""
    source = open_source("emoji_sample", "test")
    groups = source.groups
    assert groups.shape == (128,) and len(set(groups.tolist())) == 104
    few = RoutingOverrides(capacity_factor=0.3)
    loaded = vmoe.load("vmoe_emoji")
    full, half = (
        evaluate(model, source)
        for model in (loaded.model, vmoe.load("vmoe_emoji", routing=few).model)
    )
    right = [np.asarray(each.per_example.correct, float) for each in (full, half)]

    def error(values: np.ndarray) -> float:
        sums = [(values - values.mean())[groups == each].sum() for each in np.unique(groups)]
        return scipy.stats.sem(sums) * len(sums) / len(values)

    assert full.standard_error == pytest.approx(error(right[0]))
    assert full.standard_error > 1.1 * scipy.stats.sem(right[0])
    found = paired_difference(full, half)
    assert found.accuracy == pytest.approx((right[0] - right[1]).mean()) and found.accuracy
    assert found.standard_error == pytest.approx(error(right[0] - right[1]))
    assert dict(summary(full))["accuracy"] == f"{full.accuracy:.2%} ± {100 * error(right[0]):.2f}"
    some = sample(source, 40)
    np.testing.assert_array_equal(some.groups, groups[some.indices])


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample of Fashion-MNIST as a folder, which is read class by class."""
    folder, digits = tmp_path_factory.mktemp("by_class"), tuple("0123456789")
    source = open_source("fashion_mnist_sample", "test")
    for name in digits:
        (folder / "test" / name).mkdir(parents=True)
    for i, label in enumerate(source.labels):
        Image.fromarray(source.images[i]).save(folder / "test" / digits[label] / f"{i:03}.png")
    return f"folder:{folder}"


@pytest.mark.slow
def test_a_folder_is_evaluated_in_mixed_groups_and_its_results_are_in_its_own_order(
    by_class: str,
) -> None:
    """In groups of images of one class 9% of the choices are dropped, in mixed ones 3%."""
    folder, mixed = open_source(by_class, "test"), open_source("fashion_mnist_sample", "test")
    one, other = evaluate(vmoe.load("vmoe_fashion_mnist").model, folder), fashion_mnist("vmoe")
    assert one.dropped == pytest.approx(other.dropped, abs=0.005)
    assert one.order == other.order == "shuffled, seeds 0 and 1"
    dropless = vmoe.load("vmoe_fashion_mnist", routing=RoutingOverrides(dropless=True)).model
    alone, in_mixed = (evaluate(dropless, source).per_example for source in (folder, mixed))
    same = np.argsort(mixed.labels, kind="stable")
    np.testing.assert_array_equal(np.asarray(alone.labels)[:, 0], mixed.labels[same])
    np.testing.assert_allclose(alone.cross_entropy, in_mixed.cross_entropy[same], atol=1e-4)


def test_a_sample_is_read_in_the_order_of_an_evaluation_so_its_first_images_are_mixed(
    by_class: str,
) -> None:
    net, digits = model(), tuple("0123456789")
    loaded = Loaded(net, digits, Preprocessing(8), None, Origin("vmoe", Path("random")))
    data = Sample(f"{by_class}:test", loaded, images=100, batch_size=32)
    read = np.concatenate([labels[valid, 0] for _, labels, valid in data.batches()])
    own = np.array([data.source.labels_of(i)[0] for i in range(100)])
    assert (np.diff(own) >= 0).all()
    np.testing.assert_array_equal(read, own[evaluation_order(100)])
    assert np.count_nonzero(np.bincount(read[:32])) == 10


def test_predicted_classes_that_the_data_lacks_are_counted_as_other() -> None:
    wide = vmoe.create_model("vit_test", **DENSE, num_classes=13, head_std=1.0)
    source = open_source("digits", "test")
    result, logits = evaluate(wide, source), logits_of(wide, source.images)
    beyond = int((logits.argmax(1) >= 10).sum())
    assert beyond > 0 and confusion(result.per_example, 10)[:, [10]].sum() == beyond
    others = sum(row["confused_with"].get("other", 0) for row in per_class(result).values())
    assert others == beyond


def test_dropped_is_the_fraction_of_choices_without_a_slot() -> None:
    source = open_source("digits", "test")
    router = dict(capacity=1, images_per_group=1)
    full = model(2, router=router)  # 5 tokens, 2 choices each, 4 slots
    result = evaluate(full, source, Reading(64))
    _, records = forward(full, to_float(source.images))
    kept = np.mean([np.asarray(record.routing.kept).mean() for record in records.values()])
    assert result.dropped == pytest.approx(1 - kept) and result.dropped >= 0.6
    assert (result.images_per_group, result.batch_size) == ({0: 1, 1: 1}, 64)
    # one slot at each of 4 experts, for 5 tokens with 2 choices each
    assert result.capacity_factor == {0: pytest.approx(0.4), 1: pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("router", "blocks"), [(ExpertChoice(capacity=1), 1), (Soft(), 1), (TokenChoice(capacity=1), 2)]
)
def test_unprocessed_is_the_fraction_of_tokens_that_no_expert_takes(
    router: Router, blocks: int
) -> None:
    source = open_source("digits", "test")
    net = model(blocks, router=grouped(router, 1))
    result = evaluate(net, source, Reading(64))
    _, records = forward(net, to_float(source.images))
    shares = [
        1 - np.asarray(record.routing.kept).any(-1).mean() if router.kind != "soft" else 0.0
        for record in records.values()
    ]
    assert result.unprocessed == pytest.approx(np.mean(shares))
    for i, record in records.items():
        own, gates = result.totals[i], np.asarray(record.gates, np.float64)
        assert own.tokens == gates[..., 0].size
        np.testing.assert_allclose(own.gates, gates.sum((0, 1)), rtol=1e-5)
        assert own.entropy == pytest.approx(-(gates * np.log(gates)).sum(), rel=1e-5)
        soft = router.kind == "soft"
        experts = np.zeros(0, int) if soft else np.asarray(record.routing.experts)
        kept = [] if soft else experts[np.asarray(record.routing.kept)]
        assert own.kept.tolist() == np.bincount(kept, minlength=4).tolist()
        assert own.choices.tolist() == np.bincount(experts.ravel(), minlength=5)[:4].tolist()
    assert (result.unprocessed > 0.1) == (router.kind != "soft")
    rows = dict(summary(result))
    assert rows["tokens without a routed expert"] == f"{result.unprocessed:.2%}"
    assert ("choices dropped" in rows) == (result.dropped is not None) == router.can_drop


def test_a_dropless_model_drops_nothing_and_does_not_depend_on_the_batch() -> None:
    dropless, source = model(), open_source("digits", "test")
    one, other = (evaluate(dropless, source, Reading(b)) for b in (256, 7))
    assert one.dropped == other.dropped == 0 and one.capacity_factor == {0: None}
    np.testing.assert_allclose(
        one.per_example.cross_entropy, other.per_example.cross_entropy, atol=1e-5
    )
    assert ("capacity factor", "none") in summary(one)


def test_dead_experts_are_found_in_an_evaluation_and_logged_when_they_are_new_after_the_warmup(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net, source = model(seed=1), open_source("digits", "validation")
    logged: dict[int, list[str]] = {}
    healthy = NamedEvaluation("validation", "raw", evaluate(net, source))
    kernel = net.blocks[0].mlp.gate.kernel
    kernel[...] *= 0.0  # of equal gates the first are chosen
    broken = healthy._replace(result=evaluate(net, source))
    assert not findings(net.config, healthy.result.totals)
    dead, collapse = findings(net.config, broken.result.totals)
    assert "2 of 4 experts (2, 3) get less than 1% of the mean" in str(dead)
    sizes = dict(steps=60, batch_size=4, optim=OptimConfig(warmup_steps=10))
    config = TrainConfig(model=net.config, data=DataConfig("digits"), **sizes)
    ema = broken._replace(weights="ema")
    sets = {10: [broken], 20: [broken, ema], 30: [broken, ema], 40: [healthy], 50: [broken]}
    with Report(tmp_path, config) as report:
        report.resume(0, {})
        for step, each in (sets | {59: [healthy], 60: [broken]}).items():
            report.evaluations(step, each)
            lines = without_times(capfd.readouterr().err)
            logged[step] = [line for line in lines if "block 0" in line]
    found = [f"validation: {dead}", f"validation: {collapse}"]
    assert found[0].endswith(", or prune them")
    training = [found[0].removesuffix(", or prune them"), found[1]]
    assert logged == {10: [], 20: training, 30: [], 40: [], 50: training, 59: [], 60: found}


def test_another_resolution_resizes_the_images_and_resamples_the_positions() -> None:
    source, net = open_source("digits", "test"), model()
    result = evaluate(net, source, preprocessing=Preprocessing(16))
    images = np.stack([resize_and_crop(image, Preprocessing(16)) for image in source.images])
    logits = logits_of(net, images)
    assert result.image_size == 16
    assert result.accuracy == pytest.approx((logits.argmax(1) == source.labels).mean())
    with pytest.raises(UsageError, match="patches"):
        evaluate(net, source, preprocessing=Preprocessing(10))


def test_a_preprocessing_prepares_the_images_and_scales_to_another_size() -> None:
    source, net = open_source("digits", "test"), model()
    resized = Preprocessing(8, resize_to=10, keep_aspect=True)
    exact = dataclasses.replace(resized, interpolation="tf_area")
    larger = dataclasses.replace(resized, image_size=16, resize_to=20)
    for size, given, used in ((8, exact, exact), (16, resized, larger)):
        result = evaluate(net, source, preprocessing=given.scaled(size))
        images = np.stack([resize_and_crop(image, used) for image in source.images])
        log_probabilities = scipy.special.log_softmax(logits_of(net, images), axis=1)
        expected = -log_probabilities[np.arange(len(source)), source.labels]
        np.testing.assert_allclose(result.per_example.cross_entropy, expected, 1e-5, 1e-5)
        assert result.image_size == used.image_size


class ManyLabels:
    """The digits of the test split; of three, one has two labels more and one has none."""

    name, class_names, skipped, max_labels = "many labels", tuple("0123456789"), Skipped(), 3

    def __init__(self) -> None:
        self.digits = open_source("digits", "test")

    def __len__(self) -> int:
        return len(self.digits)

    def labels_of(self, index: int) -> tuple[int, ...]:
        label = int(self.digits.labels[index])
        return [(label,), (label, (label + 1) % 10, (label + 5) % 10), ()][index % 3]

    def __getitem__(self, index: int) -> Example:
        return dataclasses.replace(self.digits[index], labels=self.labels_of(index))

    def fingerprint(self) -> Fingerprint:
        return self.digits.fingerprint()


def test_any_of_several_labels_is_right_and_images_without_labels_are_counted() -> None:
    """The oracle goes through the images one by one."""
    source, net = ManyLabels(), model()
    assert isinstance(source, Source)
    result = evaluate(net, source)
    logits = logits_of(net, source.digits.images)
    labels = [source.labels_of(i) for i in range(len(source))]
    right = [row.argmax() in own for row, own in zip(logits, labels, strict=True)]
    top = [bool({*row.argsort()[-5:]} & {*own}) for row, own in zip(logits, labels, strict=True)]
    assert (result.images, result.unlabeled, result.labeled) == (360, 120, 240)
    assert result.accuracy == pytest.approx(sum(right) / 240)
    assert result.accuracy_over_all == pytest.approx(sum(right) / 360)
    assert result.top5_accuracy == pytest.approx(sum(top) / 240)
    share = sum(right) / 240
    assert result.standard_error == pytest.approx(np.sqrt(share * (1 - share) / 239))
    table = per_class(result)
    assert sum(row["images"] for row in table.values()) == 240
    by_class = sum(row["images"] * row["accuracy"] for row in table.values())
    assert by_class == pytest.approx(sum(right))
    assert ("images without a label", "120, left out") in summary(result)
    net.head.classes.kernel[...] *= -1.0
    other = evaluate(net, source)
    difference = paired_difference(result, other).accuracy
    assert difference == pytest.approx(result.accuracy - other.accuracy) and difference


def test_confusions_take_the_memory_of_those_that_occur() -> None:
    """A dense matrix of 4,000 classes would take 128 MB."""
    labels = np.array([[7, 9], [7, -1], [7, -1], [7, -1], [-1, -1]])
    predictions, correct = np.array([9, 7, 4_000, 4_321, 3]), np.array([1, 1, 0, 0, 0], bool)
    images = PerExample(labels, predictions, correct, correct, *4 * [np.zeros(5)])
    tracemalloc.start()
    counts = confusion(images, 4_000)
    _, largest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts.shape == (4_000, 4_001)
    assert dict(counts.todok().items()) == {(9, 9): 1, (7, 7): 1, (7, 4_000): 2}
    assert largest < 5e6


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_probabilities_and_their_metrics_follow_the_loss(loss: Loss) -> None:
    """Several labels share the probability of a softmax, and are each 1 in a sigmoid."""
    source, net = ManyLabels(), model()
    result = evaluate(net, source, loss=loss)
    labels = [source.labels_of(i) for i in range(len(source))]
    known = np.array([bool(own) for own in labels])
    targets = np.array([np.bincount(own, minlength=10) for own in labels if own], float)
    logits = logits_of(net, source.digits.images)[known]
    if loss == "softmax":
        p = scipy.special.softmax(logits, axis=1)
        targets /= targets.sum(1, keepdims=True)
        entropy = -(targets * np.log(p)).sum(1)
    else:
        p = scipy.special.expit(logits)
        entropy = -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).sum(1)
    assert result.probabilities == loss
    assert ("sigmoid" in dict(summary(result)).get("probabilities", "")) == (loss == "sigmoid")
    assert result.cross_entropy == pytest.approx(entropy.mean(), rel=1e-5)
    assert result.brier == pytest.approx(((p - targets) ** 2).sum(1).mean(), rel=1e-5)
    correct = targets[np.arange(len(p)), logits.argmax(1)] > 0
    expected = calibration_error_by_loop(p.max(1), correct)
    assert result.calibration_error == pytest.approx(expected, abs=1e-5)
    images = result.per_example
    np.testing.assert_allclose(images.confidence[known], p.max(1), rtol=1e-5)
    mean = [np.exp(np.log(row[target > 0]).mean()) for row, target in zip(p, targets, strict=True)]
    np.testing.assert_allclose(images.label_probability[known], mean, rtol=1e-4)


def test_a_split_without_any_label_cannot_be_evaluated() -> None:
    source = ManyLabels()
    source.labels_of = lambda index: ()
    with pytest.raises(UsageError, match="many labels: no image has a label"):
        evaluate(model(), source)


def test_an_exception_between_batches_ends_an_evaluation() -> None:
    calls = []

    def on_batch() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model(), open_source("digits", "train"), Reading(on_batch=on_batch))
    assert len(calls) == 3


def test_nan_logits_raise_a_failure_and_give_no_metrics() -> None:
    broken = model()
    broken.head.classes.bias[...] = np.full(10, np.nan, np.float32)
    with pytest.raises(Failure, match="180 of 180 images have logits that are NaN"):
        evaluate(broken, open_source("digits", "validation"))


def test_nan_logits_raise_a_failure_that_names_the_image_and_give_no_prediction(
    tmp_path: Path,
) -> None:
    loaded = vmoe.load("vmoe_fashion_mnist")
    loaded.model.head.classes.bias[...] = np.full(10, np.nan, np.float32)
    Image.fromarray(open_source("fashion_mnist_sample", "test").images[0]).save(tmp_path / "a.png")
    with pytest.raises(Failure, match="a.png: 1 of 1 images have logits that are NaN or infinite"):
        next(predict(loaded, [tmp_path / "a.png"]))


@pytest.mark.slow
def test_a_csv_file_gets_a_row_with_the_model_settings_and_versions(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = TrainConfig(
        model=replace(model().config, num_classes=10),
        data=DataConfig("digits"),
        optim=OptimConfig(warmup_steps=0),
        steps=2,
        batch_size=4,
        loss="sigmoid",
    )
    train(config, run)
    path, loaded = tmp_path / "rows.csv", vmoe.load(run)
    result = evaluate(loaded.model, open_source("digits", "validation"), loss=loaded.loss)
    for priority in ("order", "largest_gate"):
        loaded = vmoe.load(run, routing=RoutingOverrides(priority=priority))
        append_row(path, loaded, result)
        path.write_text(path.read_text().rstrip())  # as an editor may leave it
    first, second = csv.DictReader(path.read_text().splitlines())
    assert (first["priority"], second["priority"]) == ("order", "largest_gate")
    assert first["model"] != second["model"]
    assert [first[x] for x in ("checkpoint", "step", "weights", "seed")] == [
        str(run),
        "2",
        "raw",
        "0",
    ]
    assert float(second["accuracy"]) == pytest.approx(result.accuracy)
    assert first["data"] == "digits:validation" and first["order"] == "shuffled, seeds 0 and 1"
    assert first["jax"] == jax.__version__ and first["probabilities"] == "sigmoid"
    (row,) = csv.DictReader((run / "evaluations.csv").read_text().splitlines())
    assert float(first["cross_entropy"]) == pytest.approx(float(row["cross_entropy"]), rel=1e-4)
    path.write_text("other,columns\n")
    with pytest.raises(UsageError, match="it has other columns"):
        append_row(path, loaded, result)


def test_a_dense_model_has_no_groups_and_drops_nothing() -> None:
    result = evaluate(vmoe.create_model("vit_test", **DENSE), open_source("digits", "test"))
    assert (result.images_per_group, result.dropped, result.unprocessed) == ({}, None, None)


def test_an_evaluation_moves_no_array_implicitly() -> None:
    for net in (model(), vmoe.create_model("vit_test", **DENSE)):
        with jax.transfer_guard("disallow"):
            assert evaluate(net, open_source("digits", "validation")).images == 180


def test_a_prediction_has_the_classes_and_the_experts_used(tmp_path: Path) -> None:
    """40 images are more than a batch; the oracle is the model on one image at a time."""
    source, net = open_source("digits", "test"), model(router=dict(capacity=2))
    origin = Origin("run", tmp_path, "raw")
    loaded = Loaded(net, source.class_names, Preprocessing(8), step=0, origin=origin)
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        Image.fromarray(np.ascontiguousarray(source.images[i])).save(path)
    (by_itself,) = predict(dataclasses.replace(loaded, loss="sigmoid"), paths[3:4], top=3)
    predictions = list(predict(loaded, paths, top=3))
    assert [prediction.path for prediction in predictions] == list(map(str, paths))
    for i in (3, 33):
        prediction = predictions[i]
        logits, records = forward(net, to_float(source.images[i : i + 1]))
        probabilities = scipy.special.softmax(np.asarray(logits[0], np.float64))
        assert prediction.classes == [str(y) for y in np.argsort(-probabilities)[:3]]
        np.testing.assert_allclose(
            prediction.probabilities, np.sort(probabilities)[::-1][:3], rtol=1e-4
        )
        if i == 3:
            assert by_itself.classes == prediction.classes
            sigmoid = scipy.special.expit(np.sort(np.asarray(logits[0], np.float64))[::-1][:3])
            np.testing.assert_allclose(by_itself.probabilities, sigmoid, rtol=1e-4)
        for block, shares in prediction.experts.items():
            routing = records[block].routing
            sent = np.bincount(np.asarray(routing.experts)[np.asarray(routing.kept)], minlength=4)
            np.testing.assert_allclose(shares, sent / sent.sum(), rtol=1e-5)


def test_files_folders_and_patterns_give_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.JPG", "deep/c.webp", "deep/notes.txt", "strange", ".d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*words: str) -> list[str]:
        return [str(path) for path in image_files(words)[0]]

    assert found("b.JPG", "a.png") == ["b.JPG", "a.png"]
    assert found(".") == ["a.png", "b.JPG", "deep/c.webp"]
    assert image_files(["."])[1].others == ("./deep/notes.txt", "./strange")
    assert found("*.png", "a.png") == ["a.png"]
    assert found("**/*.webp") == ["deep/c.webp"]
    assert found("strange") == ["strange"], "a file given by name is used whatever its suffix"
    for words, message in [
        (["gone.png"], "gone.png: no such file or folder, and no file matches"),
        (["*.bmp"], "no file matches it"),
    ]:
        with pytest.raises(UsageError, match=message.replace("*", r"\*")):
            image_files(words)
    (tmp_path / "deep" / "c.webp").unlink()
    with pytest.raises(UsageError, match="deep: no images there"):
        image_files(["deep"])
