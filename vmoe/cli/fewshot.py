"""``vmoe evaluate --fewshot``."""

import sys
from typing import TYPE_CHECKING, Any, Literal

from vmoe.cli.data import data_of
from vmoe.cli.printing import print_json, print_table, progress
from vmoe.config import DataConfig, FewShotConfig
from vmoe.errors import UsageError, one_line

if TYPE_CHECKING:
    from vmoe.cli.evaluate import EvaluateArgs
    from vmoe.evaluate.fewshot import FewShotResult
    from vmoe.factory import Loaded

PREPARED = {
    "model": "images were prepared as for the model (--fewshot-preprocessing paper for the paper's "
    "resize and crop)",
    "paper": "images were resized to 256/224 of the model's size and cropped, as in the paper "
    "(--fewshot-preprocessing model to prepare them as for the model)",
}
L2_CHOSEN = {
    "test": "each L2 was chosen on the test images, as in the paper, so that accuracies are "
    "optimistic; --fewshot-l2 train avoids this",
    "train": "each L2 was chosen on training images that are no shots",
}


def run_fewshot(args: "EvaluateArgs", loaded: "Loaded") -> None:
    """Probes a trained model, and prints the accuracies.

    Raises:
        UsageError: the shots are not numbers, or there is no such data.
    """
    from vmoe.data.problems import Unreadable
    from vmoe.data.sources import skipped_messages
    from vmoe.evaluate.fewshot import fewshot
    from vmoe.evaluate.fewshot_data import open_fewshot

    config = _config(args, loaded)
    reading = loaded.train_config.data if loaded.train_config else DataConfig()
    data = open_fewshot(config, check=reading.check, on_error=reading.on_error)
    left_out = Unreadable("left out")
    sources = [source for each in data for source in each.sources]
    steps = len(data) * len(config.shots) + sum(-(-len(x) // config.batch_size) for x in sources)
    with progress("few-shot probes", steps) as advance:
        result = fewshot(
            loaded.model,
            data,
            config,
            loaded.preprocessing,
            image_size=args.image_size,
            on_batch=advance,
            on_unreadable=left_out.add if reading.on_error == "replace" else None,
        )
    messages = [message for each in data for message in each.messages]
    for line in [*skipped_messages(sources), *messages, *left_out.news()]:
        print(one_line(line), file=sys.stderr)
    if args.json:
        print_json(_as_json(loaded, config, result))
    else:
        _print(loaded, config, result)


def _config(args: "EvaluateArgs", loaded: "Loaded") -> FewShotConfig:
    try:
        shots = tuple(int(word) for word in (args.fewshot or "").split(","))
    except ValueError:
        problem = "give numbers of images per class, such as 1,5,10,25"
        raise UsageError(problem, fewshot=args.fewshot) from None
    data = args.data or tuple(filter(None, [data_of(loaded)]))
    if not data:
        raise UsageError("--data is missing: the checkpoint does not name its training data")
    return FewShotConfig(
        data=data,
        shots=shots,
        seed=args.fewshot_seed,
        choose_l2=args.fewshot_l2,
        preprocessing=args.fewshot_preprocessing or _usual_preprocessing(loaded),
        batch_size=args.batch_size,
    )


def _usual_preprocessing(loaded: "Loaded") -> Literal["model", "paper"]:
    """The paper's for weights of its authors, which do not say how images were prepared."""
    origin = loaded.origin
    return "paper" if (origin.copied_from or origin.format) in ("published", "npz") else "model"


def _as_json(loaded: "Loaded", config: FewShotConfig, result: "FewShotResult") -> dict[str, Any]:
    return {
        "step": loaded.step,
        "weights": loaded.origin.weights,
        "shots": result.shots,
        "accuracy": result.accuracy,
        "mean": result.mean,
        "l2": result.l2,
        "l2_chosen_on": config.choose_l2,
        "preprocessing": config.preprocessing,
        "seed": config.seed,
    }


def _print(loaded: "Loaded", config: FewShotConfig, result: "FewShotResult") -> None:
    average = " (moving average)" if loaded.origin.weights == "ema" else ""
    step = "" if loaded.step is None else f", step {loaded.step}"
    rows = [*result.accuracy.items(), *([("mean", result.mean)] if len(config.data) > 1 else [])]
    print_table(
        ("", *(f"{n} shot{'s' * (n > 1)}" for n in result.shots)),
        [
            *((name, *(f"{accuracy:.2%}" for accuracy in row)) for name, row in rows),
            ("L2", *(f"{l2:.4g}" for l2 in result.l2)),
        ],
        title=f"{loaded.origin.path}{step}{average}, few-shot accuracy",
    )
    print(PREPARED[config.preprocessing])
    print(L2_CHOSEN[config.choose_l2])
