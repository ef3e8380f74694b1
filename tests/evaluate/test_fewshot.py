"""The few-shot probe equals stored runs of the authors' code, scikit-learn, and slow loops."""

import csv
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.linear_model import Ridge

import vmoe
from tests.command import TINY
from tests.command import vmoe as command
from vmoe.checkpoints import read, write
from vmoe.config import FewShotConfig
from vmoe.config.fewshot import PAPER_DATA
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.crops import resize_and_crop
from vmoe.data.reading import Reading
from vmoe.data.sources import Example, Source, open_source, sample
from vmoe.data.sources.views import View
from vmoe.errors import Failure, UsageError
from vmoe.evaluate.fewshot import FewShotData, fewshot, open_fewshot, prepare
from vmoe.evaluate.probe import L2, choose_l2, draw, fit
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT

FOLDER = Path(__file__).parents[1] / "golden" / "fewshot"
RUNS = {path.stem: dict(np.load(path)) for path in sorted(FOLDER.glob("*.npz"))}
FIELDS = dict(image_size=8, patch_size=4, depth=1, sparse_blocks=(0,), pre_logits=24, num_classes=3)
OWN = Preprocessing(8)
"""Of the model; nothing is cropped."""


def stored_probes() -> list[tuple[str, str, int]]:
    """Run, data set and shots of every stored probe whose features are stored."""
    return [
        (run, name.split("/")[0], int(shots))
        for run, arrays in RUNS.items()
        for name in arrays
        if name.endswith("train_features")
        for shots in arrays["shots"]
    ]


@pytest.mark.parametrize(("run", "data", "shots"), stored_probes())
def test_a_probe_equals_the_published_one(run: str, data: str, shots: int) -> None:
    """Float32 is off at small L2, by what the stored float64 accuracies say."""
    stored = {k.removeprefix(f"{data}/"): v for k, v in RUNS[run].items() if k.startswith(data)}
    labels, classes = stored["train_labels"], int(stored["num_classes"])
    drawn = draw(labels, classes, shots, int(stored["seed"]))
    np.testing.assert_array_equal(drawn, stored[f"indices/{shots}shot"])
    probe = fit(stored["train_features"][drawn], labels[drawn], classes)
    test, test_labels = stored["test_features"], stored["test_labels"]
    accuracy = np.array([probe.accuracy(test, test_labels, l2) for l2 in L2])
    exact, theirs = (stored[f"accuracy{x}/{shots}shot"] for x in ("_float64", ""))
    row = 1 / len(test) + 1e-6
    np.testing.assert_allclose(accuracy, exact, rtol=0, atol=row)
    large = np.array(L2) >= 2**6
    assert (abs(accuracy - theirs) <= np.where(large, row, abs(theirs - exact) + 0.02)).all()
    scores = stored[f"scores/{shots}shot_l2_20"]
    np.testing.assert_allclose(
        probe.scores(test[:50], L2[20]), scores, rtol=0, atol=1e-4 * abs(scores).max()
    )


@pytest.mark.parametrize("run", RUNS)
def test_the_chosen_l2_equals_the_published_one_where_ties_do_not_decide(run: str) -> None:
    """Their sort is unstable: the choice depends on it where a stable sort gives another one."""
    stored, compared = RUNS[run], 0
    for shots in stored["shots"]:
        sets = sorted(name for name in stored if name.endswith(f"accuracy/{shots}shot"))
        chosen = L2[choose_l2(np.stack([stored[name] for name in sets]).astype(float))]
        if stored[f"best_l2/{shots}shot"] == stored[f"best_l2_stable_ties/{shots}shot"]:
            assert chosen == stored[f"best_l2/{shots}shot"]
            compared += 1
    assert compared >= 2


def test_equal_accuracies_share_a_rank_and_the_largest_of_equal_l2_is_chosen() -> None:
    one, other, tied = [0.2, 0.5, 0.4, 0.1], [0.6, 0.7, 0.9, 0.5], [0.3, 0.3, 0.3, 0.3]
    assert choose_l2(np.array([one])) == 1
    assert choose_l2(np.array([one, tied])) == 1, "a tie has no say"
    assert choose_l2(np.array([tied])) == 3
    assert choose_l2(np.array([one, other])) == 2, "ranks 4 3 and 3 4: the larger L2"


@pytest.mark.parametrize(("images", "features"), [(40, 7), (12, 30)])
def test_scores_equal_scikit_learns_ridge(images: int, features: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, images)
    train, test = rng.normal(3, 5, (images, features)), rng.normal(3, 5, (9, features))
    mean, std = train.mean(0), train.std(0) + 1e-5

    def whitened(x: np.ndarray) -> np.ndarray:
        return np.column_stack([(x - mean) / std, np.full(len(x), 100.0)])

    targets = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    probe = fit(train, labels, 4)
    for l2 in L2[::7]:
        ridge = Ridge(alpha=l2, fit_intercept=False, solver="cholesky", tol=1e-12)
        expected = ridge.fit(whitened(train), targets).predict(whitened(test))
        np.testing.assert_allclose(probe.scores(test, l2), expected, rtol=1e-6, atol=1e-9)


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded(View):
    """Digits with other labels, which records the images that are read."""

    labels: tuple[tuple[int, ...], ...]
    read: list[int] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        return dataclasses.replace(self.source[index], labels=self.labels[index])

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self.labels[index]


def recorded(split: str, change: Callable[[int, int], tuple[int, ...]]) -> Recorded:
    """Digits whose label y at index i becomes ``change(i, y)``."""
    source = sample(open_source("digits", split), 300)
    labels = (source.labels_of(i)[0] for i in range(len(source)))
    return Recorded(source, tuple(change(i, label) for i, label in enumerate(labels)))


def model() -> ViT:
    return vmoe.create_model(
        "vmoe_test_last2_e4", **FIELDS, moe=dict(router=dict(capacity_factor=4.0))
    )


def features_and_labels(
    net: ViT, source: Source, pipeline: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """The pre-logits of images; no token is dropped."""
    images = [resize_and_crop(np.asarray(source[i].image), pipeline) for i in range(len(source))]
    features = pre_logits(*nnx.split(net), to_float(np.stack(images)))
    labels = np.array([source.labels_of(i)[0] for i in range(len(source))])
    return np.asarray(features, np.float64), labels


@functools.partial(jax.jit, static_argnums=0)
def pre_logits(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    net = nnx.merge(graph, state)
    return net.forward_head(net.forward_features(images), pre_logits=True)


PAPER = Preprocessing(8, resize_to=9, interpolation="tf_bilinear")


@pytest.mark.parametrize(
    ("choose", "prepared", "pipeline"), [("test", "paper", PAPER), ("train", "model", OWN)]
)
def test_accuracies_equal_a_ridge_on_the_pre_logits(
    choose: str, prepared: str, pipeline: Preprocessing
) -> None:
    """Batches have padding. With this seed the two ways to choose an L2 differ clearly."""
    net, train, test = model(), *(sample(open_source("digits", x), 120) for x in ("train", "test"))
    config = FewShotConfig(
        shots=(2, 5), seed=4, choose_l2=choose, preprocessing=prepared, batch_size=70
    )
    result = fewshot(net, [prepare("digits", train, test, config)], config, OWN)
    (features, labels), tested = (
        features_and_labels(net, source, pipeline) for source in (train, test)
    )
    rng = np.random.default_rng(4)
    of_class = [rng.permutation(np.flatnonzero(labels == y)) for y in range(10)]
    others = np.concatenate([each[5:10] for each in of_class])
    chooser = tested if choose == "test" else (features[others], labels[others])
    for i, shots in enumerate(config.shots):
        rows = np.concatenate([each[:shots] for each in of_class])
        probe = fit(features[rows], labels[rows], 10)
        accuracies = [probe.accuracy(*tested, l2) for l2 in L2]
        np.testing.assert_allclose(result.by_l2["digits"][i], accuracies, atol=3 / len(test))
        by_chooser = np.array([probe.accuracy(*chooser, l2) for l2 in L2])
        assert by_chooser[L2.index(result.l2[i])] >= by_chooser.max() - 0.03
        assert result.accuracy["digits"][i] == result.by_l2["digits"][i, L2.index(result.l2[i])]
    assert result.mean == result.accuracy["digits"]


def test_only_the_largest_number_of_shots_is_read_and_the_labels_of_others_excluded() -> None:
    """Every fifth training image has two labels; the class 9 has 3 images, the test images 60."""
    kept = iter(range(3))

    def of_train(i: int, label: int) -> tuple[int, ...]:
        if label == 9 and next(kept, None) is None:
            return ()
        return (label, (label + 1) % 10) if label != 9 and i % 5 == 0 else (label,)

    train = recorded("train", of_train)
    test = recorded("test", lambda i, y: (y,) if i < 60 else ())
    config = FewShotConfig(shots=(1, 4), batch_size=70)
    data = prepare("odd", train, test, config)
    assert not train.read and not test.read
    fewshot(model(), [data], config, OWN)
    assert len(train.read) == len(set(train.read)) == 9 * 4 + 3
    assert all(len(train.labels[i]) == 1 for i in train.read)
    assert sorted(test.read) == list(range(60))
    excluded = sum(len(labels) != 1 for labels in train.labels)
    assert data.messages == (
        f"odd: {excluded:,} of {len(train):,} training images are excluded from the probe: they "
        "have several labels, or none",
        "odd: 240 of 300 test images are excluded from the probe: they have several "
        "labels, or none",
        "odd: 1 of 10 classes have fewer than 4 training images; the probe uses all that they have",
    )


def test_one_l2_serves_all_data_sets_whose_classes_need_not_be_the_models() -> None:
    net, config = model(), FewShotConfig(shots=(5,), batch_size=70)
    digits = prepare("a", *(recorded(x, lambda i, y: (y,)) for x in ("train", "test")), config)
    parity = prepare("b", *(recorded(x, lambda i, y: (y % 2,)) for x in ("train", "test")), config)
    result = fewshot(net, [digits, parity], config, OWN)
    tables = np.stack([result.by_l2[name][0] for name in ("a", "b")])
    assert result.l2 == (L2[choose_l2(tables)],)
    assert result.mean[0] == pytest.approx(tables[:, L2.index(result.l2[0])].mean())


def test_an_unreadable_image_is_left_out_and_reported_or_raised(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(6)):
        path = tmp_path / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    config, reasons = FewShotConfig((f"folder:{tmp_path}",), shots=(6,), batch_size=70), []
    (data,) = open_fewshot(config)
    broken = Path(data.train[0].origin)
    broken.write_bytes(broken.read_bytes()[:100])
    fewshot(model(), [data], config, OWN, Reading(on_unreadable=reasons.append))
    assert [str(broken) in str(reason) for reason in reasons] == [True]
    with pytest.raises(UsageError, match=broken.name):
        fewshot(model(), [data], config, OWN)


def test_a_data_name_may_name_both_splits() -> None:
    config = FewShotConfig(("digits", "digits:validation,test"), shots=(1,))
    default, other = open_fewshot(config)
    assert [source.name.partition(",")[0] for source in default.sources + other.sources] == [
        "digits:train",
        "digits:test",
        "digits:validation",
        "digits:test",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(data=("digits:test",)),
            "fewshot.data=digits:test: a probe needs two splits, such as",
        ),
        (dict(data=("digits:train,tset",)), "no split 'tset': did you mean 'test'"),
        (dict(data=("emoji_sample",)), "no split 'train'"),
        (dict(data=("digits", "digits")), "give each once"),
        (dict(shots=()), "fewshot.shots=.*: give at least one"),
        (dict(shots=(0, 1)), "fewshot.shots=.*: use at least 1"),
        (dict(every=0), "fewshot.every=0: use at least 1"),
        (dict(seed=-1), "fewshot.seed=-1: use at least 0"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_fewshot(FewShotConfig(**fields))


def test_what_cannot_be_probed_is_refused() -> None:
    train, test = (sample(open_source("digits", x), 60) for x in ("train", "test"))
    config = FewShotConfig(shots=(60,), choose_l2="train", batch_size=70)
    unlabeled = recorded("test", lambda i, label: ())
    with pytest.raises(UsageError, match="digits:test.*: no image has exactly one label"):
        prepare("digits", train, unlabeled, config)
    data: FewShotData = prepare("digits", train, test, config)
    with pytest.raises(UsageError, match="every training image of digits is a shot"):
        fewshot(model(), [data], config, OWN)
    bad = model()
    bad.head.pre_logits.bias[...] = np.full(24, np.nan, np.float32)
    with pytest.raises(Failure, match="60 of 60 images have features that are NaN"):
        fewshot(bad, [data], config, OWN)


@pytest.mark.process
def test_the_command_prints_a_table_or_json(tiny_run: Path, tmp_path: Path) -> None:
    """Images are prepared as for the model; for the authors' checkpoints as in the paper.

    Copies of these are measured as they are, also a copy of a copy.
    """
    options = ("--shots", "1", "5", "--data", "digits")
    line = ("probe", "--checkpoint", tiny_run, *options)
    as_json = command(*line, "digits:validation,test", "--choose-l2", "train", "--json")
    assert as_json.returncode == 0, as_json.stderr
    found = json.loads(as_json.stdout)
    assert (found["shots"], found["l2_chosen_on"]) == ([1, 5], "train")
    assert list(found["accuracy"]) == ["digits", "digits:validation,test"]
    assert found["mean"] == pytest.approx(np.mean(list(found["accuracy"].values()), axis=0))
    assert found["preprocessing"] == "model"
    published = write(read(tiny_run), tmp_path / "published", format="published")
    as_json = command("probe", "--checkpoint", published, *options, "--json")
    assert as_json.returncode == 0, as_json.stderr
    copy = write(read(published), tmp_path / "copy", format="vmoe")
    again = write(read(copy), tmp_path / "again", format="vmoe")
    table = command("probe", "--checkpoint", again, *options)
    assert table.returncode == 0, table.stderr
    for accuracy in json.loads(as_json.stdout)["accuracy"]["digits"]:
        assert f"{accuracy:.2%}" in table.stdout
    assert (
        "images were resized to 256/224 of the model's size and cropped, as in the paper"
        in table.stdout
    )
    assert "few-shot accuracy" in table.stdout and "1 shot " in table.stdout
    assert "each L2 was chosen on the test images" in table.stdout
    assert "mean" not in table.stdout, "of one data set"


@pytest.mark.slow
def test_a_run_probes_its_moving_average_as_the_command_does_afterwards(tmp_path: Path) -> None:
    line = ["train", "--config", TINY, "--workdir", tmp_path / "run", "--steps", "40"]
    line += ["--ema-decay", "0.9", "--fewshot.data", "digits"]
    line += ["--fewshot.shots", "1", "5", "--fewshot.every", "20"]
    result = command(*line)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "run" / "fewshot.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["step"], row["weights"], row["data"], row["shots"]) for row in rows] == [
        (step, "ema", "digits", shots) for step in ("20", "40") for shots in ("1", "5")
    ]
    assert re.search(r"step 40/40, 100%.*  few-shot \(EMA\)  1: ", result.stderr)
    after = command("probe", "--checkpoint", tmp_path / "run", "--shots", "1", "5", "--json")
    assert after.returncode == 0, after.stderr
    found = json.loads(after.stdout)
    for i, row in enumerate(rows[2:]):
        assert float(row["accuracy"]) == pytest.approx(found["accuracy"]["digits"][i], rel=1e-5)
        assert float(row["l2"]) == pytest.approx(found["l2"][i], rel=1e-5)


@pytest.mark.parametrize("name", PAPER_DATA)
def test_a_data_set_of_the_paper_is_looked_for_in_tfds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=rf"{name.split(':')[1]}: no data sets in {tmp_path}"):
        open_fewshot(FewShotConfig(data=(name,)))
