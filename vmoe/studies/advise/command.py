"""``vmoe advise``."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import UsageError, naming, one_line
from vmoe.progress import progress

BATCH = 32
"""Images that are read at a time, and at most those of a training step, as in the experiment."""
CONFIG = """\
import vmoe
from vmoe.config import DataConfig, EvalConfig, LrFactorsConfig, OptimConfig
from vmoe.config import PreprocessingConfig, TrainConfig, replace

sparse = vmoe.load("sparse")
how = sparse.preprocessing
config = TrainConfig(
    model=replace(
        sparse.model.config,
        image_size=how.image_size,
        num_classes={classes},
        pooling="{pooling}",
    ),
    data=DataConfig(
        {data!r},
        preprocessing=PreprocessingConfig(exif=how.exif, keep_aspect=how.keep_aspect),
    ),
    optim=OptimConfig(lr=3e-4, warmup_steps=25, lr_factors=LrFactorsConfig(others=0)),
    steps=250,
    batch_size={batch},
    evaluations=(EvalConfig(preprocessing=how),),
)
"""
"""The training of the experiment as far as a config describes it: of the experts and the head."""
NEW_HEAD = (
    "the head, if there is one, reads the class token, so experts of the last block would work for "
    "that token only: the advice and the commands are for a new head, which reads the mean of the "
    "patches"
)


@dataclasses.dataclass(frozen=True)
class AdviseArgs:
    """Say whether a sparse last block would help on some images, by three measured data sets.

    Example: `vmoe advise photos --checkpoint hf://OWNER/NAME`
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER|NAME[:SPLIT]")]
    """Images with classes: a folder with a sub-folder for each class, or as for `vmoe train
    --data.name`; by default the split train. Of these, 256 are read."""
    checkpoint: Path | None = None
    """Trained dense model that would get experts, as for `vmoe evaluate`. If None, no image is
    read, and only the number of images is shown beside those of the experiment."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Measures images, and prints what was found on images like them."""
    args = parse(AdviseArgs, "advise", argv)
    from vmoe.checkpoints import read
    from vmoe.data.pipeline import check_labeled
    from vmoe.data.reading import Reading
    from vmoe.data.sources import KINDS, name_and_split, open_source, sample, skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate.sample import open_any_classes
    from vmoe.passes import inputs
    from vmoe.studies.advise.advice import COMPARED, Advice, advise, read_reference, table
    from vmoe.studies.advise.measures import EXPERTS, IMAGES, measure, with_patch_mean
    from vmoe.surgery.upcycle import upcycled_layer

    is_folder = args.data not in KINDS and Path(args.data).is_dir()
    data = f"folder:{args.data}" if is_folder else args.data
    stored = read(args.checkpoint) if args.checkpoint else None
    if stored:
        with naming(args.checkpoint):
            if blocks := stored.config.sparse_blocks:
                raise UsageError(f"blocks {blocks} have experts already: give a dense model")
            upcycled_layer(stored.config)  # raises an error if MLPs cannot become experts
        source, replace = open_any_classes(data, stored, split="train")
    else:
        name, split = name_and_split(data)
        source, replace = open_source(name, split or "train"), False
    check_labeled(source)
    images, classes = len(source), len(source.class_names)
    if classes < 2:
        raise UsageError(f"{source.name}: give images of two classes at least, it has {classes}")
    reference, own, commands, config, messages = read_reference(), None, [], "", []
    measured = " and ".join(COMPARED.values())
    found = Advice("not known", f"{measured} are measured with a dense model only")
    left_out = Unreadable("left out")
    if stored:
        trained, some = with_patch_mean(stored.config), sample(source, IMAGES)
        with progress(f"{some.name}, batches", -(-len(some) // BATCH)) as advance:
            on_unreadable = left_out.add if replace else None
            reading = Reading(BATCH, on_batch=advance, on_unreadable=on_unreadable)
            dense = stored.model()
            own = measure(
                dense, inputs(dense, some, stored.preprocessing, reading, any_classes=True)
            )
        found = advise(trained, own, images, reference)
        repooled = trained != stored.config
        messages = [NEW_HEAD] * repooled
        where = ["--blocks", f"{trained.depth - 1}", "--num-experts", f"{EXPERTS}"]
        train = ["--config", "sparse.py", "--workdir", "runs/sparse", "--init", "sparse"]
        train += ["--init-partial"] * repooled
        commands = [["vmoe", "upcycle", f"{args.checkpoint}", "sparse", *where]]
        commands += [["vmoe", "train", *train]]
        config = CONFIG.format(
            **dict(classes=classes, pooling=trained.pooling, data=data),
            batch=min(BATCH, 1 << images.bit_length() - 1),
        )
    print_messages([*skipped_messages([source]), *left_out.news(), *messages])
    if args.json:
        print_json(
            dict(data=source.name, images=images, classes=classes, measures=own)
            | found._asdict()
            | dict(commands=commands, config=config, reference=reference)
        )
        return
    columns, rows = table(own, images, reference, found.nearest)
    print_table(columns, rows, title=f"{source.name}: {images:,} images of {classes:,} classes")
    print(one_line(f"would experts help? {found.verdict}: {found.reason}"))
    print(
        f"three data sets and one model, {reference.model}, make no law (table of {reference.date})"
    )
    print(
        f"sparse is {EXPERTS} experts, two for each token; dense is an MLP of twice the hidden "
        "units, with equal FLOPs; 95% intervals are in brackets"
    )
    costs = [
        f"{name} {each['parameters'] / 1e6:.1f} million parameters, {each['ms']:.1f} ms per image"
        for name, each in reference.costs.items()
    ]
    if costs:
        print(f"their costs in the experiment, on a CPU: {'; '.join(costs)}")
    if not commands:
        print(f"to know more: {shlex.join(['vmoe', 'advise', data])} --checkpoint DENSE")
        return
    upcycle, train = map(shlex.join, commands)
    print(f"to try it:\n\n{upcycle}\ncat > sparse.py <<'END'\n{config}END\n{train}")
