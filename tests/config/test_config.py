"""Configs: recipes, JSON, and the values that are refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import TINY
from tests.routers import grouped
from vmoe import config as configs
from vmoe.config import (
    CnnExpert,
    EvalConfig,
    Exchange,
    ExpertChoice,
    ExpertList,
    FewShotConfig,
    GatedMlpExpert,
    Hash,
    LrFactorsConfig,
    MlpExpert,
    MoEConfig,
    OptimConfig,
    Preprocessing,
    ReLU,
    RoutingOverrides,
    Soft,
    Switch,
    TokenChoice,
    TrainConfig,
    ViTConfig,
    replace,
)
from vmoe.config.dry_run import cut_model
from vmoe.config.files import OF_EXCHANGE
from vmoe.errors import UsageError

RECIPES = Path(__file__).parents[2] / "configs"


def test_the_dense_twin_differs_only_in_its_sparse_blocks() -> None:
    sparse, dense = (configs.load(RECIPES / f"{x}.py") for x in ("digits", "digits_dense"))
    assert replace(dense, model=dict(sparse_blocks=sparse.model.sparse_blocks)) == sparse
    assert dense.model.sparse_blocks == ()


def test_a_config_that_comes_with_vmoe_is_found_by_its_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.load("tiny") == configs.load(RECIPES / "tiny.py")
    (tmp_path / "tiny").write_text("config = 1")  # a file of this name goes first
    with pytest.raises(UsageError, match="tiny: the file must define"):
        configs.load("tiny")


@pytest.mark.parametrize("router", [ExpertChoice(noise_std=0.5), Soft()])
def test_json_keeps_the_router_of_each_block(router: configs.AnyRouter) -> None:
    moe = (MoEConfig(), MoEConfig(router=grouped(router, 1)))
    config = ViTConfig(sparse_blocks=(1, 3), moe=moe)
    assert configs.from_json(ViTConfig, configs.to_json(config)) == config


def set_with(**overrides: Any) -> EvalConfig:
    """An evaluation set with routing overrides."""
    return EvalConfig(routing=RoutingOverrides(**overrides))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model=dict(pre_logits=0)), "model.pre_logits=0"),
        (dict(optim=dict(b1=2.0)), "optim.b1=2.0"),
        (
            dict(optim=dict(weight_decay=dict(head=-1.0))),
            "optim.weight_decay.head=-1.0: use at least 0",
        ),
        (dict(optim=dict(grad_clip_norm=0.0)), "optim.grad_clip_norm=0.0: use more than 0"),
        (
            dict(optim=dict(lr_factors=dict(experts=-1.0))),
            "optim.lr_factors.experts=-1.0: use at least 0",
        ),
        (
            dict(optim=dict(lr_factors=dict(head=float("nan")))),
            "optim.lr_factors.head=nan: use a finite number of float32",
        ),
        (
            dict(model=dict(head_bias=1e300)),
            r"model.head_bias=1e\+300: use a finite number of float32",
        ),
        (dict(optim=dict(expert_averaging=1.5)), "optim.expert_averaging=1.5: use at most 1"),
        (dict(optim=dict(layer_decay=0.0)), "optim.layer_decay=0.0: use more than 0"),
        (dict(optim=dict(layer_decay=1.5)), "optim.layer_decay=1.5: use at most 1"),
        (
            dict(optim=dict(lr_factors=dict(head=0.0, others=0.0))),
            "optim.lr_factors: head, others are all 0, so there is nothing to train",
        ),
        (
            dict(
                model=dict(sparse_blocks=(1,)),
                optim=dict(lr_factors=LrFactorsConfig(0.0, 0.0, 0.0, 0.0)),
            ),
            "optim.lr_factors: head, others, routers, experts are all 0",
        ),
        (dict(ema_decay=1.0), "ema_decay=1.0: use less than 1"),
        (dict(keep_latest=0), "keep_latest=0: use at least 1"),
        (dict(evaluations=()), "evaluations=.*: give at least one"),
        (dict(evaluations=(EvalConfig(), EvalConfig())), "are not unique"),
        (
            dict(
                data=dict(preprocessing=dict(exif=False)),
                evaluations=(EvalConfig(preprocessing=Preprocessing(64)),),
            ),
            "evaluations.preprocessing.exif=True with data.preprocessing.exif=False: set 'vali",
        ),
        (
            dict(evaluations=(EvalConfig(image_size=100),)),
            "image_size=100 with model.patch_size=32",
        ),
        (
            dict(model=dict(sparse_blocks=(1,)), evaluations=(set_with(k=9),)),
            "evaluations, set 'validation': model.moe.router.k=9 with model.moe.num_experts=8",
        ),
        (
            dict(
                model=dict(sparse_blocks=(1,), moe=MoEConfig(router=Soft())),
                evaluations=(set_with(capacity_factor=4.0),),
            ),
            "routing.capacity_factor=4.0: the slots of a soft router are parameters",
        ),
        (dict(seed=-1), "seed=-1"),
        (dict(steps=50), "steps=50: use optim.warmup_steps of at most 49, or more"),
        (
            dict(steps=120, optim=dict(schedule="rsqrt", cooldown_steps=21)),
            "optim.cooldown_steps=21 with optim.warmup_steps=100 and steps=120: use a shorter",
        ),
        (
            dict(steps=1000, epochs=3.0),
            "steps=1000 with epochs=3.0: a run has one length; set the others to None",
        ),
        (dict(epochs=0.0), "epochs=0.0: use more than 0"),
        (dict(images=0), "images=0: use at least 1"),
        (dict(accumulate=0), "accumulate=0: use at least 1"),
        (dict(optim=dict(timescale=0)), "optim.timescale=0: use at least 1"),
        *(
            (fields, "=2147483648: use at most 2147483647")
            for fields in (
                dict(steps=2**31),
                dict(batch_size=2**31),
                dict(log_every=2**31),
                dict(optim=dict(timescale=2**31)),
                dict(fewshot=dict(every=2**31)),
                dict(model=dict(width=2**31)),
            )
        ),
        (dict(model=dict(image_size=65536)), "model.image_size=65536: use less than 65536"),
        (dict(model=dict(num_classes=-1)), "model.num_classes=-1: use at least 0"),
        (dict(images=10**20), "images=1000.*: use an int of 64 bits or None"),
        (dict(data=dict(rotate=1e20)), "data.rotate=1e\\+20: use at most 180"),
        (
            dict(model=dict(moe=dict(router=dict(aux_loss=dict(importance=-1.0))))),
            "model.moe.router.aux_loss.importance=-1.0: use at least 0",
        ),
        (
            dict(optim=dict(schedule="constant", power=3.0)),
            "optim.power=3.0 with optim.schedule=constant: it has no effect, only with "
            "polynomial; leave it at 2.0",
        ),
        (dict(data=dict(mixup=-0.1)), "data.mixup=-0.1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TrainConfig(), **fields)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (dict(epochs=7.0), 7 * 25),
        (dict(epochs=0.07, batch_size=1), 7),  # as floats, 0.07 * 100 is more than 7
        (dict(epochs=1.01), 26),
        (dict(images=100), 25),
        (dict(images=101), 26),
        (dict(steps=9), 9),
        (dict(), 1000),
    ],
)
def test_a_length_in_epochs_or_images_is_rounded_up_to_steps(
    length: dict[str, Any], steps: int
) -> None:
    config = TrainConfig(**dict(batch_size=4, optim=OptimConfig(warmup_steps=1)) | length)
    resolved = config.with_steps(100)
    assert (resolved.steps, resolved.epochs, resolved.images) == (steps, None, None)
    assert resolved.total_steps == steps and resolved.with_steps(7) == resolved


def test_the_steps_of_a_config_in_epochs_are_not_known_before_the_data_is_opened() -> None:
    config = TrainConfig(epochs=2.0)
    with pytest.raises(UsageError, match="epochs=2.0: give the length in steps"):
        str(config.total_steps)
    with pytest.raises(UsageError, match="optim.warmup_steps=100 with steps=50"):
        config.with_steps(800)
    assert configs.from_json(TrainConfig, configs.to_json(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = (", r"line 1: '\(' was never closed"),
        ("import nothing_like_it\n", "line 1: No module named 'nothing_like_it'"),
        (
            "from vmoe.config import TrainConfig\n\nconfig = TrainConfig(stepz=3)\n",
            "line 3: .*'stepz'",
        ),
        ("config = 3\n", "the file must define"),
    ],
)
def test_an_error_in_a_recipe_is_one_line_that_names_the_file(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        configs.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_json_with_an_unknown_field_or_a_wrong_type_is_refused_by_name() -> None:
    text = configs.to_json(TrainConfig())
    with pytest.raises(UsageError, match="TrainConfig stebs"):
        configs.from_json(TrainConfig, text.replace('"steps"', '"stebs"'))
    with pytest.raises(UsageError, match="TrainConfig optim.lr"):
        configs.from_json(TrainConfig, text.replace('"lr": 0.001', '"lr": "high"'))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            {"kind": "later"},
            r"router.kind: 'later' is none of 'token_choice', .*'switch'.*; import the",
        ),
        ({"kind": "switch", "k": 1}, r"router.switch.k: Unexpected keyword argument"),
    ],
)
def test_a_wrong_router_in_json_is_reported_by_its_kind(
    router: dict[str, Any], message: str
) -> None:
    fields = json.loads(configs.to_json(configs.load(TINY)))
    fields["model"]["moe"]["router"] = router
    with pytest.raises(UsageError, match=message):
        configs.from_json(TrainConfig, json.dumps(fields))


GROUPS = ("capacity_factor", "capacity", "images_per_group")
OLDER = {"dropout": "expert_dropout", "implementation": "implementation"}


@pytest.mark.parametrize(
    ("router", "moved", "experts", "gelu"),
    [
        (
            TokenChoice(k=1, dropless=True),
            (*GROUPS, "dropless"),
            GatedMlpExpert(dropout=0.5, activation="gelu"),
            "erf",
        ),
        (
            ExpertChoice(capacity=3),
            (*GROUPS, "capacity_rounding"),
            CnnExpert(shared_init=False),
            None,
        ),
        (
            Soft(capacity_factor=2.0),
            GROUPS[:2],
            MlpExpert(implementation="batched", activation="quick_gelu"),
            "quick",
        ),
    ],
)
def test_an_older_run_has_a_gelu_and_settings_of_its_router_and_experts_beside_them(
    router: configs.AnyRouter, moved: tuple[str, ...], experts: Any, gelu: str | None
) -> None:
    """Those that its kind of router or expert does not have had no effect."""
    exchange = Exchange("bfloat16", chunks=2 if isinstance(experts, MlpExpert) else 1)
    layer = MoEConfig(router=grouped(router, 2), experts=experts, exchange=exchange)
    other = TrainConfig(model=ViTConfig(sparse_blocks=(1, 3), moe=(MoEConfig(), layer)))
    for config, place in ((TrainConfig(model=ViTConfig(moe=layer)), ()), (other, (1,))):
        fields = json.loads(configs.to_json(config))
        older = fields["model"]["moe"]
        for i in place:
            older = older[i]
        older |= {name: older["router"].pop(name) for name in moved}
        older |= {"capacity_multiple": older["router"].pop("capacity_multiple", 4)}
        older |= {} if "dropless" in moved else {"dropless": False}
        older |= {"images_per_group": 1} if router.kind == "soft" else {}
        older["shared_init"] = older["experts"].pop("shared_init")
        exchange = older.pop("exchange")
        older |= {name: exchange[own] for name, own in OF_EXCHANGE.items()}
        assert fields["model"].pop("activation") == "gelu_tanh"
        fields["model"]["gelu"] = "tanh"
        if "activation" in older["experts"]:
            older["experts"]["activation"] = gelu
        for name, before in OLDER.items():
            older[before] = older["experts"].pop(name, {"dropout": 0.0}.get(name, "auto"))
        assert configs.from_json(TrainConfig, json.dumps(fields)) == config
        assert configs.from_json(ViTConfig, json.dumps(fields["model"])) == config.model


@dataclasses.dataclass(frozen=True)
class Nameless(configs.Router):
    """Without a kind."""


@dataclasses.dataclass(frozen=True)
class Other(TokenChoice):
    """With the kind of another class."""


@pytest.mark.parametrize("router", [Nameless(), Other()], ids=["no kind", "another's kind"])
def test_a_router_that_could_not_be_read_again_is_not_written(router: configs.Router) -> None:
    message = f"its class {type(router).__name__} needs a kind of its own"
    with pytest.raises(UsageError, match=message):
        configs.to_json(TrainConfig(model=ViTConfig(moe=MoEConfig(router=router))))


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=16, router=ReLU(target_k=8)),
        MoEConfig(num_experts=16, router=TokenChoice(shares=(1.0,) * 16, k=9)),
        MoEConfig(num_experts=8, experts=ExpertList(each=(MlpExpert(),) * 8)),
        MoEConfig(num_experts=16, exchange=Exchange(hot_experts=9)),
    ],
    ids=["target_k", "shares", "list", "hot experts"],
)
def test_a_dry_run_has_fewer_experts_of_any_layer(moe: MoEConfig) -> None:
    for devices, experts in ((1, 4), (2, 4), (3, 6), (8, 8)):
        cut = cut_model(ViTConfig(sparse_blocks=(1,), moe=moe), devices).moe_blocks[1]
        assert cut.num_experts == experts and cut.router.k <= experts


def test_a_setting_given_in_a_router_and_beside_it_is_refused() -> None:
    fields = json.loads(configs.to_json(ViTConfig()))
    fields["moe"]["capacity_factor"] = 9.0
    with pytest.raises(UsageError, match="capacity_factor of model.moe: given in it and beside it"):
        configs.from_json(ViTConfig, json.dumps(fields))


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"moe": ', "is not JSON"), ('{"moe": {"router": {"kind": [3]}}}', "none of 'token_choice'")],
)
def test_text_that_is_no_config_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=f"ViTConfig.*{problem}"):
        configs.from_json(ViTConfig, text)


def test_json_with_a_field_that_occurs_twice_is_refused_by_name() -> None:
    """The values differ, and one of them would be ignored."""
    text = configs.to_json(TrainConfig())
    with pytest.raises(UsageError, match="is not JSON: the field 'steps' occurs twice"):
        configs.from_json(TrainConfig, text.replace('"steps"', '"steps": 7, "steps"'))


@pytest.mark.parametrize(("data", "expected"), [(("digits",), "paper"), ((), "model")])
def test_probes_of_an_older_run_are_prepared_as_they_were(
    data: tuple[str, ...], expected: str
) -> None:
    """Its config.json has no such field; without probes, it is the run that it would be today."""
    fields = json.loads(configs.to_json(TrainConfig(fewshot=FewShotConfig(data=data))))
    del fields["fewshot"]["preprocessing"]
    older = configs.from_json(TrainConfig, json.dumps(fields))
    assert older.fewshot.preprocessing == expected


EXPERTS = "a MlpExpert or a GatedMlpExpert or a CnnExpert or an AttentionExpert"
REFUSED = {
    "ViTConfig(pooling='gap')": "model.pooling=gap: choose from class_token, mean",
    "ViTConfig(num_classes='ten')": "model.num_classes=ten: use an int of 64 bits, not str",
    "replace(ViTConfig(), moe=dict(router=dict(kind='soft')))": (
        "model.moe.router.kind=soft: choose from token_choice"
    ),
    "MoEConfig(router='soft')": (
        "model.moe.router=soft: use an AnyRouter such as TokenChoice, not str"
    ),
    "ViTConfig(sparse_blocks=[1])": "model.sparse_blocks=[1]: use a tuple of int, not list",
    "ViTConfig(head_std=float('nan'))": "model.head_std=nan: use a finite number of float32",
    "ExpertList(each=('mlp',))": f"model.moe.experts.each=('mlp',): use {EXPERTS} or",
    "ExpertList(each=(ExpertList(),))": f"model.moe.experts.each: use {EXPERTS} or an Identity",
    "ExpertList(each='mlp')": "model.moe.experts.each=mlp: use a tuple of MlpExpert or Gated",
    "MoE(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), None)": "experts is one Linear, whose variables need",
    "MoE(MlpExpert(), None)": "experts=MlpExpert: give a list with one module for each expert",
    "MoE([nnx.Linear(8, 8, rngs=nnx.Rngs(0))] * 8, CosineGate())": (
        "gate=CosineGate: give a module that makes logits"
    ),
    "MoE([nnx.Linear(8, 8, rngs=nnx.Rngs(0))] * 8, nnx.relu, shared=nnx.relu)": (
        "the shared expert (custom_jvp) is not an nnx.Module: give a module; a function can be"
    ),
}
"""Expressions, and the start of the message of each."""


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """From a process without the tests' type checker, which would refuse the values first."""
    code = f"""
from flax import nnx
from vmoe import MoE
from vmoe.config import *

for expression in {list(REFUSED)}:
    try:
        eval(expression)
    except Exception as error:
        print(type(error).__name__, repr(str(error)), sep=": ")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip(REFUSED, result.stdout.splitlines(), strict=True))


@pytest.mark.process
@pytest.mark.parametrize("expression", REFUSED)
def test_values_of_the_wrong_type_are_refused_by_configs_and_layers_themselves(
    expression: str, messages: dict[str, str]
) -> None:
    kind, message = messages[expression].split(": ", 1)
    assert kind == "UsageError" and eval(message).startswith(REFUSED[expression]), message


def test_routing_overrides_change_only_the_settings_they_name() -> None:
    layers = (
        MoEConfig(router=TokenChoice(capacity=3)),
        MoEConfig(router=ExpertChoice(images_per_group=2)),
    )
    trained = ViTConfig(sparse_blocks=(1, 3), moe=layers)
    assert RoutingOverrides().apply(trained) == EvalConfig().model(trained) == trained
    overrides = dict(capacity_factor=4.0, k=1, priority="largest_gate")
    changed = RoutingOverrides(**overrides).apply(trained)
    assert set_with(**overrides).model(trained) == changed
    first, second = changed.moe
    assert (first.router.capacity, first.router.capacity_factor) == (None, 4.0)
    assert (first.router.k, first.router.priority) == (1, "largest_gate")
    assert second == replace(layers[1], router=dict(capacity_factor=4.0))
    first, second = RoutingOverrides(dropless=True).apply(trained).moe
    assert (
        first == replace(layers[0], router=dict(dropless=True, capacity=None))
        and second == layers[1]
    )
    dropless = replace(trained, moe=(first, second))
    again = RoutingOverrides(capacity_factor=4.0).apply(dropless).moe
    assert not again[0].router.dropless and again[0].router.capacity_factor == 4.0
    again = RoutingOverrides(capacity=5, images_per_group=1).apply(dropless).moe
    for router in (one.router for one in again):
        assert (router.dropless, router.capacity, router.images_per_group) == (False, 5, 1)


DENSE, SPARSE = ViTConfig(), ViTConfig(sparse_blocks=(1,))
SOFT = replace(SPARSE, moe=MoEConfig(router=Soft()))
SWITCH, HASH = (replace(SPARSE, moe=MoEConfig(router=each())) for each in (Switch, Hash))


@pytest.mark.parametrize(
    ("trained", "overrides", "message"),
    [
        (DENSE, dict(k=1), "routing.k=1: no block of this model is sparse, leave it out"),
        (SOFT, dict(capacity=3), "routing.capacity=3: the slots of a soft router are parameters"),
        (SOFT, dict(priority="random"), "routing.priority=random: router soft has no priority"),
        (SWITCH, dict(k=1), "routing.k=1: router switch has no k, leave it out"),
        (HASH, dict(priority="order"), "routing.priority=order: router hash has no priority"),
        (SOFT, dict(dropless=True), "routing.dropless=True: router soft never drops a choice"),
        (SPARSE, dict(k=9), "k=9 with model.moe.num_experts=8"),
        (SPARSE, dict(k=0), "routing.k=0: use at least 1"),
        (SPARSE, dict(capacity_factor=0.0), "routing.capacity_factor=0.0: use more than 0"),
        (SPARSE, dict(dropless=True, capacity=2), "routing.capacity=2 with routing.dropless=True"),
        (SPARSE, dict(capacity_factor=1.0, capacity=2), "with routing.capacity=2: the capacity"),
    ],
)  # fmt: skip
def test_an_override_that_has_no_effect_or_is_invalid_is_refused_by_name(
    trained: ViTConfig, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        RoutingOverrides(**overrides).apply(trained)
