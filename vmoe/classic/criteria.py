"""Criteria for the number of experts: less is better.

AIC and BIC count the free parameters; the sample size of BIC is the sum of the weights. ICL also
counts how unsure the responsibilities are, by the hard assignment of each row to its most probable
expert (Biernacki, Celeux & Govaert 2000): ICL = BIC - 2 sum_t w_t log max_e h_te.
"""

import numpy as np

from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows


def aic(mixture: Mixture, rows: Rows) -> float:
    """Akaike's information criterion."""
    return 2 * mixture.n_parameters() - 2 * _log_likelihood(mixture, rows)


def bic(mixture: Mixture, rows: Rows) -> float:
    """The Bayesian information criterion."""
    size = np.log(rows.weight.sum())
    return float(size * mixture.n_parameters() - 2 * _log_likelihood(mixture, rows))


def icl(mixture: Mixture, rows: Rows) -> float:
    """The integrated completed likelihood."""
    posterior, _ = mixture.posterior(rows)
    sure = np.log(posterior.max(axis=1))
    return bic(mixture, rows) - 2 * float(rows.weight @ sure)


def _log_likelihood(mixture: Mixture, rows: Rows) -> float:
    return float(rows.weight @ mixture.posterior(rows)[1])
