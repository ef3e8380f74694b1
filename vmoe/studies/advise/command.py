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


@dataclasses.dataclass(frozen=True)
class AdviseArgs:
    """Say whether a sparse last block would help on some images, by three measured data sets.

    Example: `vmoe advise photos --checkpoint hf://OWNER/NAME`
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Images with classes: a folder, or NAME[:SPLIT] as for `vmoe train --data.name`. The training
    split counts, and 256 of its images are read."""
    checkpoint: Path | None = None
    """Trained dense model that would get experts, as for `vmoe evaluate`. If None, no image is
    read, and only their number is compared."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Measures images, and prints what was found on images like them."""
    args = parse(AdviseArgs, "advise", argv)
    from vmoe.checkpoints import read
    from vmoe.data.reading import Reading
    from vmoe.data.sources import KINDS, name_and_split, open_source, sample, skipped_messages
    from vmoe.passes import inputs
    from vmoe.studies.advise.advice import advise, described, read_reference, table
    from vmoe.studies.advise.measures import EXPERTS, IMAGES, measure
    from vmoe.surgery.upcycle import upcycled_layer

    name, split = name_and_split(args.data)
    if name.partition(":")[0] not in KINDS and Path(name).is_dir():
        name = f"folder:{name}"
    source = open_source(name, split or "train")
    labels = [own for own in map(source.labels_of, range(len(source))) if own]
    classes = len({label for own in labels for label in own})
    if classes < 2:
        raise UsageError(f"{source.name}: give images of two classes at least, it has {classes}")
    own, model, again = None, "", ["vmoe", "advise", args.data, "--checkpoint", "DENSE"]
    if args.checkpoint:
        stored = read(args.checkpoint)
        with naming(args.checkpoint):
            if blocks := stored.config.sparse_blocks:
                raise UsageError(f"blocks {blocks} have experts already: give a dense model")
            upcycled_layer(stored.config)  # raises an error if MLPs cannot become experts
        dense, images, batch = stored.model(), sample(source, IMAGES), 32
        with progress(f"{images.name}, batches", -(-len(images) // batch)) as advance:
            reading = Reading(batch, on_batch=advance)
            own = measure(
                dense, inputs(dense, images, stored.preprocessing, reading, any_classes=True)
            )
        last = ["--blocks", f"{stored.config.depth - 1}", "--num-experts", f"{EXPERTS}"]
        again = ["vmoe", "upcycle", f"{args.checkpoint}", "SPARSE", *last]
        model = described(stored.config)
    print_messages(skipped_messages([source]))
    reference = read_reference()
    found = advise(own, len(labels), reference)
    if args.json:
        values = dict(data=source.name, images=len(labels), classes=classes, model=model)
        measures = dict(measures=own and own._asdict(), command=again)
        print_json(values | measures | found._asdict() | dict(reference=reference))
        return
    columns, rows = table(own, len(labels), reference, found.nearest)
    title = f"{source.name}: {len(labels):,} images of {classes:,} classes"
    print_table(columns, rows, title=title)
    if model:
        print(f"your model: {model}; the experiment's: {reference.model}")
    print(one_line(f"would experts help? {found.verdict}: {found.reason}"))
    print(f"three data sets: no law (table of {reference.date})")
    print(f"to {'try it' if args.checkpoint else 'know more'}: {shlex.join(again)}")
