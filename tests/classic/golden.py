"""The stored results of R's flexmix and mixtools, and of a plain loop for hierarchical mixtures.

The files were computed without a penalty and without a bound on the variance. In flexmix's files a
step is an M-step and then an E-step, from a start of responsibilities; in the others the start is
parameters, and a step is an E-step and then an M-step.

Left out: steps of mixtools in its own order (``mixtools_step*``) and its variances with another
divisor (``*_stockvariance``), which are other algorithms; flexmix's ICL (``icl_flexmix``), whose
definition differs; and its gate of the last step (``flexmix_gate_coef``), fitted once more at the
end. Files whose data belong to R's packages are compared by ``scripts/experiments/mixtures``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from vmoe.classic import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor

FOLDER = Path(__file__).parent.parent / "golden" / "classic"
EXACT = {"gate_penalty": 0.0, "expert_penalty": 0.0, "variance_floor": 0.0, "tol": 0.0}
FAMILIES = {"gaussian": "linear", "poisson": "poisson"}


class Golden:
    """One stored file; the gate's columns come after the experts' if they differ."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.classifies = self.meta["family"] in ("binomial", "multinom")

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def columns(self, suffix: str = "") -> np.ndarray:
        """All columns of the rows; the gate's are the last ones."""
        x = self[f"x{suffix}"]
        gate = self.arrays.get(f"x_gate{suffix}", x)
        return np.hstack([x, gate])

    @property
    def settings(self) -> dict[str, Any]:
        experts = "logistic" if self.classifies else FAMILIES[self.meta["family"]]
        d = self["x"].shape[1]
        gate = [] if "final/mixing" in self.arrays else slice(d, None)
        return {"experts": experts, "expert_features": slice(d), "gate_features": gate, **EXACT}

    def fit(self, steps: int, start: Any) -> Any:
        """The mixture after so many steps from a start."""
        kind = MixtureOfExpertsClassifier if self.classifies else MixtureOfExpertsRegressor
        model = kind(int(self["k"]), start=start, max_iter=steps, **self.settings)
        with pytest.warns(ConvergenceWarning):
            return model.fit(self.columns(), self["y"], self.arrays.get("weights"))


def flexmix() -> list[Any]:
    """The ten files of flexmix."""
    files = sorted(FOLDER.glob("flexmix*"))
    assert len(files) == 10
    return [pytest.param(Golden(file), id=file.stem) for file in files]
