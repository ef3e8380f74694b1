"""Published checkpoints are read and written; incomplete ones are an error."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

import vmoe
from tests.published import published_family
from tests.random_models import model_of, outputs, random_images, stored_model
from vmoe import zoo
from vmoe.checkpoints import chunked, read
from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo
from vmoe.checkpoints.assemble import outline
from vmoe.checkpoints.export import published
from vmoe.checkpoints.from_flax import ASSUMED
from vmoe.config import (
    AttentionExpert,
    BiasBalanced,
    CnnExpert,
    CosineGate,
    ExpertList,
    GatedMlpExpert,
    GShard,
    Hash,
    IdentityExpert,
    MlpExpert,
    MlpGate,
    NoisyGate,
    Random,
    RoutingOverrides,
    Switch,
    TokenChoice,
    ZeroExpert,
    replace,
)
from vmoe.errors import Failure, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLES = [GOLDEN / "published" / name / "ckpt" for name in ("sharded", "pieces")]
SWITCH = dict(router=Switch(images_per_group=8))
FLOAT32 = {"moe": {"exchange": {"dtype": "float32"}}}  # the stored runs send rows in float32

PUBLISHED = [
    ("s32_last2_ilsvrc2012", dict(name="vmoe_s32_last2_e8")),
    ("s32_last2_ft384", dict(name="vmoe_s32_last2_e8", image_size=384, pre_logits=None)),
    ("b16_every2_in21k", dict(name="vmoe_b16_every2_e8", num_classes=21_843)),
    ("b16_every2_ft384", dict(name="vmoe_b16_every2_e8", image_size=384)),
]


def independent_read(prefix: Path) -> dict[str, np.ndarray]:
    """A short reader that trusts everything, written independently of the package."""
    index = msgpack.unpackb(Path(f"{prefix}.index").read_bytes())
    names: list[tuple[str, msgpack.ExtType]] = []

    def walk(tree: dict[str, Any], path: str) -> None:
        for key in sorted(tree):
            if isinstance(tree[key], dict):
                walk(tree[key], f"{path}{key}/")
            else:
                names.append((path + key, tree[key]))

    walk(index["index"], "")
    arrays = {}
    for name, leaf in names:
        shape, dtype, *_ = msgpack.unpackb(msgpack.unpackb(leaf.data)[0])
        arrays[name] = np.full(shape, 77, np.dtype(dtype))
    for i in range(index["shard_count"]):
        data = Path(f"{prefix}.data-{i:05d}-of-{index['shard_count']:05d}").read_bytes()
        for key, slices in msgpack.unpackb(data).items():
            for pieces, box in slices if key.isdigit() else ():
                parts = [msgpack.unpackb(piece.data) for piece in pieces]
                flat = np.concatenate([np.frombuffer(raw, dtype) for _, dtype, raw in parts])
                where = [msgpack.unpackb(each) for each in msgpack.unpackb(box.data)]
                array = arrays[names[int(key)][0]]
                place = tuple(slice(start, stop) for start, stop, _ in where)
                array[place] = flat.reshape(array[place].shape)
    return arrays


@pytest.mark.parametrize("prefix", SAMPLES, ids=lambda prefix: prefix.parent.name)
@pytest.mark.parametrize("priority", ["bpr", "vanilla"])
def test_a_published_checkpoint_gives_the_authors_logits(
    prefix: Path, priority: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(GOLDEN / f"tiny_last2_k2_{priority}_c0.5_indices.npz") as golden:
        images, logits = golden["images"], golden["logits"]
    routing = RoutingOverrides(
        capacity_factor=0.5,
        images_per_group=2,
        priority="largest_gate" if priority == "bpr" else "order",
    )
    loaded = vmoe.load(prefix, routing=routing, model=FLOAT32)
    np.testing.assert_allclose(outputs(loaded.model, images), logits, atol=2e-5)
    assert "capacity_factor=1.05, as in the authors' pre-training; " in capsys.readouterr().err
    assert loaded.origin.format == "published" and loaded.class_names == tuple("0123456789")
    assert loaded.preprocessing.interpolation == "tf_bilinear"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_written_checkpoint_is_bitwise_equal_for_an_independent_reader(
    shards: int, tmp_path: Path
) -> None:
    original = independent_read(SAMPLES[1])
    stored = read(SAMPLES[0])
    published.write(tmp_path / "copy", stored.config, stored.params, shards=shards)
    copy = independent_read(tmp_path / "copy")
    assert sorted(copy) == sorted(original) and len(list(tmp_path.iterdir())) == shards + 1
    for name, array in original.items():
        np.testing.assert_array_equal(copy[name], array)
        assert copy[name].dtype == array.dtype


def test_routers_gates_and_experts_that_the_format_does_not_have_are_refused_by_name(
    tmp_path: Path,
) -> None:
    kinds = [CnnExpert(), AttentionExpert(), GatedMlpExpert(), IdentityExpert(), ZeroExpert()]
    listed = ExpertList(each=(MlpExpert(), *kinds[2:]))
    routers = [GShard(), BiasBalanced(), Random(), Hash(), TokenChoice(normalize_weights=True)]
    for fields, named in (
        *(({"router": x}, f"block 1 has router {x.kind}: .* not normalized") for x in routers),
        *(
            ({"experts": x}, f"experts.kind={x.kind} with block=1: .* no experts other than mlp")
            for x in (*kinds, listed, MlpExpert(activation="relu"))
        ),
        *(
            ({"gate": x}, f"gate.kind={x.kind} with block=1: .* no gate other than linear")
            for x in (NoisyGate(), CosineGate(), MlpGate())
        ),
        ({"shared_experts": 1}, "shared_experts=1 with block=1: .* no shared experts"),
        ({"routed_scale": 2.5}, "routed_scale=2.5 with block=1: .* no routed scale"),
    ):
        config = vmoe.models.model_config("vmoe_test_last2_e4", moe=fields)
        with pytest.raises(UsageError, match=named):
            published.write(tmp_path / "model", config, {})
    assert not list(tmp_path.iterdir())


def test_an_image_size_that_no_array_tells_is_refused(tmp_path: Path) -> None:
    """A reader takes 224 px for models with fixed positions."""
    stored = stored_model("vit_test", positions="sincos2d", depth=1)
    with pytest.raises(UsageError, match="image_size=32 with model.positions=sincos2d: .* as 224"):
        published.write(tmp_path / "model", stored.config, stored.params)
    config = replace(stored.config, image_size=224)
    published.write(tmp_path / "model", config, stored.params)
    assert read(tmp_path / "model").config.image_size == 224


def test_a_resampling_of_positions_that_the_authors_do_not_use_is_refused(tmp_path: Path) -> None:
    config = vmoe.models.model_config("vit_test", position_resampling="bicubic")
    with pytest.raises(UsageError, match="position_resampling=bicubic: .* read with bilinear"):
        published.write(tmp_path / "model", config, {})
    assert not list(tmp_path.iterdir())


def test_a_switch_model_is_written_as_token_choice_of_one_expert(tmp_path: Path) -> None:
    """Its parameters are the same, and so are its logits with k = 1."""
    stored = stored_model("vmoe_test_last2_e4", depth=2, sparse_blocks=(1,), moe=SWITCH)
    published.write(tmp_path / "model", stored.config, stored.params)
    loaded = vmoe.load(tmp_path / "model", routing=RoutingOverrides(k=1), model=FLOAT32)
    images = random_images()
    np.testing.assert_array_equal(outputs(loaded.model, images), outputs(model_of(stored), images))


def test_arrays_of_any_dtype_and_shape_are_written_and_read(tmp_path: Path) -> None:
    arrays = {
        "a/scalar": np.array(3, np.int32),
        "a/b10": np.arange(24).astype("bfloat16").reshape(4, 3, 2),
        "a/b2": np.arange(6, dtype=np.float16).reshape(2, 3),
        "z/empty": np.zeros((0, 3), np.uint32),
    }
    published.write_arrays(tmp_path / "x", arrays, shards=2)
    file = chunked.read(tmp_path / "x")
    found = dict(file.read(["a/scalar", "a/b10", "z/empty"]))
    assert sorted(found) == ["a/b10", "a/scalar", "z/empty"]
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype
    np.testing.assert_array_equal(independent_read(tmp_path / "x")["a/b2"], arrays["a/b2"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint with two data files."""
    arrays = {"params/a": np.ones((4, 3), np.float32), "params/b": np.ones(5, np.float32)}
    published.write_arrays(tmp_path / "x", arrays, shards=2)
    return tmp_path / "x"


def change_index(prefix: Path, change: Callable[[Any], None]) -> None:
    path = Path(f"{prefix}.index")
    index = msgpack.unpackb(path.read_bytes())
    change(index)
    path.write_bytes(msgpack.packb(index))


def entry(shape: list[int], boxes: list[list[tuple[int, int]]], files: list[int]) -> Any:
    packed = [
        msgpack.packb([msgpack.packb((start, stop, None)) for start, stop in box]) for box in boxes
    ]
    shaped = msgpack.packb((shape, "float32", False, {}))
    return msgpack.ExtType(8, msgpack.packb((shaped, packed, files)))


def with_a(shape: list[int], boxes: list[list[tuple[int, int]]]) -> Callable[[Any], None]:
    files = [0, 1, 0, 1][: len(boxes)]
    return lambda index: index["index"]["params"].update(a=entry(shape, boxes, files))


ROWS = [(0, 3)]
CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "older": (lambda index: index.pop("version"), "it has no version"),
    "other version": (lambda index: index.update(version="20990101"), "version '20990101'"),
    "hole": (with_a([4, 3], [[(0, 2), *ROWS], [(3, 4), *ROWS]]), "params/a: its slices leave"),
    "overlap": (
        with_a([4, 3], [[(0, 2), *ROWS], [(1, 3), *ROWS]]),
        "params/a: its slices leave elements out, or overlap",
    ),
    "twice": (
        with_a([4, 3], [[(0, 2), *ROWS], [(0, 2), *ROWS]]),
        "params/a: its slices leave elements out, or overlap",
    ),
    "outside": (with_a([4, 3], [[(0, 2), *ROWS], [(2, 5), *ROWS]]), "params/a: slice"),
    "absurd size": (with_a([1 << 20, 1 << 20], [[(0, 1 << 20)] * 2]), "its data files"),
    "many axes": (with_a([1] * 9, [[(0, 1)] * 9]), "params/a: shape"),
    "other slices": (
        with_a([4, 3], [[(0, 1), *ROWS], [(1, 4), *ROWS]]),
        "params/a: slice ((0, 2), (0, 3)), which the index does not expect here",
    ),
    "name": (lambda index: index["index"].update({"../x": entry([0], [], [])}), "name '../x'"),
    "no entry": (lambda index: index["index"]["params"].update(a=5), "params/a: not valid in this"),
    "shards": (lambda index: index.update(shard_count=3), "x.data-00000-of-00003: missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_is_not_whole_is_refused_by_file_and_array(
    change: str, checkpoint: Path
) -> None:
    change_index(checkpoint, CHANGES[change][0])
    with pytest.raises(Failure) as caught:
        file = chunked.read(checkpoint)
        list(file.read(list(file.infos)))
    assert CHANGES[change][1] in str(caught.value), caught.value


@pytest.mark.parametrize("keep", [0, 30, -1])
def test_a_truncated_data_file_is_refused(keep: int, checkpoint: Path) -> None:
    path = Path(f"{checkpoint}.data-00001-of-00002")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Failure, match="x.index: corrupt|data-00001-of-00002: corrupt"):
        file = chunked.read(checkpoint)
        list(file.read(list(file.infos)))


def test_any_exact_cover_by_boxes_is_accepted_and_any_other_refused() -> None:
    """Against counting how often each element is covered."""
    rng = np.random.default_rng(0)
    ranges = [(a, b) for a in range(3) for b in range(a + 1, 4)]
    boxes = list(itertools.product(ranges, ranges))
    accepted = 0
    for _ in range(20_000):
        chosen = [boxes[i] for i in rng.choice(len(boxes), rng.integers(1, 5))]
        count = np.zeros((3, 3), int)
        for rows, columns in chosen:
            count[slice(*rows), slice(*columns)] += 1
        info = ArrayInfo((3, 3), np.dtype("float32"))
        try:
            chunked._check_cover(chosen, info)
        except ValueError:
            assert (count != 1).any()
        else:
            assert (count == 1).all()
            accepted += 1
    assert accepted > 50


def test_an_ensemble_of_experts_is_refused_by_its_name(tmp_path: Path) -> None:
    arrays = independent_read(SAMPLES[0])
    name = "params/Encoder/encoderblock_1/Moe/Router/dense/kernel"
    arrays[name] = arrays[name].reshape(16, 2, 2)
    published.write_arrays(tmp_path / "eee", arrays)
    with pytest.raises(UsageError, match=r"this is an E\^3 ensemble"):
        read(tmp_path / "eee")


def test_arrays_beside_the_parameters_are_reported_and_left_out(tmp_path: Path) -> None:
    arrays = independent_read(SAMPLES[0]) | {"opt_state/count": np.array(3), "step": np.array(9)}
    published.write_arrays(tmp_path / "more", arrays)
    assert read(tmp_path / "more").origin.unused == ("opt_state/count", "step")


@pytest.mark.parametrize(("name", "changes"), PUBLISHED)
def test_the_names_and_shapes_of_a_published_model_give_its_config(
    name: str, changes: dict[str, Any]
) -> None:
    shapes = json.loads((GOLDEN / "published_shapes.json").read_text())[name]
    infos = {
        f"params/{each}": ArrayInfo(tuple(shape), np.dtype("float32"))
        for each, shape in shapes.items()
    }
    file = ArrayFile(Path(name), infos, lambda names: iter(()))
    config = outline(published_family(file, moe=ASSUMED)).config
    expected = vmoe.models.model_config(**changes)
    assert vmoe.config.replace(config, head_bias=expected.head_bias) == expected


@pytest.mark.parametrize(
    ("tag", "factor", "source"),
    [
        ("in1k_light", 4.0, "as in the authors' evaluation"),
        ("in1k_light_ft_in1k_384", 1.5, "as in training"),
        ("in1k_medium", 4.0, "as for in1k_light, because the config of in1k_medium is not public"),
        ("in21k_strong", 1.05, "as in training"),
        ("in21k_strong_ft_in1k_384", 1.5, "as in training"),
    ],
)
def test_a_published_checkpoint_has_the_capacity_factor_and_the_loss_of_its_authors(
    tag: str, factor: float, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are known by their name, wherever they are; the arrays of these are small.

    From scratch the authors train with the sigmoid loss; they fine-tune with the softmax.
    """
    entry = next(entry for entry in zoo.ENTRIES if entry.tag == tag)
    prefix = tmp_path / entry.path.rpartition("/")[2]
    published.write_arrays(prefix, independent_read(SAMPLES[0]))
    stored = read(prefix)
    assert {moe.router.capacity_factor for moe in stored.config.moe_blocks.values()} == {factor}
    assert entry.capacity_factor == factor and not stored.preprocessing.exif
    assert stored.loss == ("softmax" if "_ft_" in tag else "sigmoid")
    assert f"; capacity_factor={factor}, {source}; " in capsys.readouterr().err
