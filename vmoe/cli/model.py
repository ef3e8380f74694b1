"""The options of commands that use a trained model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.cli.printing import print_messages
from vmoe.config import RoutingOverrides

if TYPE_CHECKING:
    from vmoe.factory import Loaded

UNITS = {"flops": "FLOPs", "time": "time"}
AS_TRAINED = "none"  # the value of --routing-file for no file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A trained model, its resolution and its routing."""

    checkpoint: Path
    """Trained model: a run folder, or checkpoints/STEP, checkpoints/best or checkpoints/last in it;
    a file or folder of other weights, their URL, or a name of `vmoe models --pretrained`."""
    image_size: int | None = None
    """Input resolution in pixels; if None, the resolution of the training. Resize and crop sizes
    scale with it, and position embeddings are resampled."""
    routing: RoutingOverrides = RoutingOverrides()
    routing_file: str = ""
    """Use the routing in this file, which `vmoe capacity` wrote; `none` for the routing as trained.
    If empty, routing.json of the run folder is used, if it exists and no --routing is given."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""

    def load(self, **devices: Any) -> "Loaded":
        """The model, on one device or as given; with a note on a routing file that it uses."""
        from vmoe.data.pipeline import ORDER
        from vmoe.factory import load
        from vmoe.workdir.routing_file import OLDER_NAME, ROUTING_FILE

        unchanged = self.routing == RoutingOverrides()
        file = {"": unchanged, AS_TRAINED: False}.get(self.routing_file, self.routing_file)
        loaded = load(
            self.checkpoint,
            routing=self.routing,
            use_ema=self.use_ema,
            routing_file=file,
            **devices,
        )
        if loaded.routing_file:
            path, chosen = loaded.routing_file
            other = chosen.step != loaded.step and None not in (chosen.step, loaded.step)
            step = f", at step {chosen.step} of training" if other else ""
            cost = f"{chosen.cost:.3g}x the {UNITS[chosen.by]}"
            line = f"routing of {path}: {cost}, chosen on {chosen.data}"
            lines = [f"{line}{step} (--routing-file none turns it off)"]
            if chosen.order != ORDER:
                lines.append(
                    f"{path}: its accuracies are of images in another order ({chosen.order}; now "
                    f"{ORDER}): run vmoe capacity again to measure them"
                )
            if path.name == OLDER_NAME:
                lines.append(
                    f"{path}: rename it to {ROUTING_FILE}, its name in this version of vmoe"
                )
            print_messages(lines)
        if self.image_size is None:
            return loaded
        scaled = loaded.preprocessing.scaled(self.image_size)
        return dataclasses.replace(loaded, preprocessing=scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyArgs:
    """A trained model, and a sample of images to study it on."""

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    data: str = ""
    """NAME[:SPLIT]; the data set of the run if empty, its test split if no split is named."""
    images: int = 512
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 64
    """Images per batch and device."""
    routing: RoutingOverrides = RoutingOverrides()
    """Routing settings of --checkpoint."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def load(self, **devices: Any) -> "Loaded":
        """The model, on one device or as given."""
        from vmoe.factory import load

        return load(self.checkpoint, routing=self.routing, use_ema=self.use_ema, **devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceArgs:
    """The devices that compute, and the processes that read images."""

    mesh: str = ""
    """Devices for each axis, as for `vmoe train --mesh`, such as data=2,expert=4. By default all
    devices share the images, in a mesh that suits the model."""
    fsdp: bool = False
    """Also shard dense parameters over the data axis, if the model is too large for one device."""
    num_workers: int | None = None
    """Number of processes that read images; 0 to read in threads. If None, one fewer than the
    cores, or threads where they are as fast."""

    @property
    def devices(self) -> dict[str, Any]:
        """The devices, for ``load``."""
        return dict(mesh=self.mesh, fsdp=self.fsdp)
