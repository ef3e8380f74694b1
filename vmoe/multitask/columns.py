"""Tables: numeric and categorical columns, and their encoding as the rows of a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.sparse import issparse
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from vmoe.classic.design import select_columns
from vmoe.multitask.values import (
    as_array,
    as_list,
    as_numbers,
    as_pandas,
    as_values,
    is_missing,
    is_numeric,
    type_of,
)

MANY = 10  # as many categories are never too many, however few rows there are


class Table(NamedTuple):
    """Rows of a table as a model reads them.

    Attributes:
        numbers: standardized columns.
        codes: the category of each categorical column; the number of its categories where it is
            missing or was not seen in ``fit``.
    """

    numbers: Float[Any, "b _"]
    codes: Int[Any, "b _"]


class TableEncoder:
    """Encodes a DataFrame or an array as a ``Table``, by scikit-learn's encoders.

    Attributes:
        names: the names of the columns, or their indices.
        categorical: whether a column is categorical.
        num_categories: number of categories of each categorical column.
        problems: what to warn of: columns of one value, and columns that are categorical by
            default and have more categories than half the number of rows.
    """

    def fit_transform(
        self, X: Any, categorical: Any = None, sample_weight: np.ndarray | None = None
    ) -> Table:
        """Learns scales and categories; returns the rows.

        Args:
            sample_weight: how much each row counts in the scales; None for 1.
            categorical: names or indices of the categorical columns. By default those columns of a
                DataFrame that are not numbers, or have pandas' type "category".
        """
        is_frame = hasattr(X, "iloc")
        columns = columns_of(X)
        self.names = list(X.columns) if is_frame else list(range(len(columns)))
        self.categorical = np.zeros(len(columns), bool)
        if categorical is not None:
            self.categorical[select_columns(categorical, X, "categorical")] = True
        elif is_frame:
            self.categorical[:] = [
                is_category(X.iloc[:, i]) or not is_numeric(values)
                for i, values in enumerate(columns)
            ]
        self._codes = OrdinalEncoder(
            handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-1
        )
        self._scaler = StandardScaler()
        self.num_categories: list[int] = []
        self._types = self._types_of(columns)
        categories, numbers = self._categories(columns), None
        differ, nearly_unique = np.zeros((2, len(columns)), bool)
        if self.categorical.any():
            known = self._codes.fit(categories).categories_
            self.num_categories = [len(each) - (each[-1] is None) for each in known]
            differ[self.categorical] = [len(each) > 1 for each in known]
            if categorical is None:
                limit = max(MANY, len(X) / 2)
                nearly_unique[self.categorical] = np.array(self.num_categories) > limit
        if not self.categorical.all():
            numbers = self._numbers(columns)
            with np.errstate(over="ignore", invalid="ignore"):
                self._scaler.fit(numbers, sample_weight=sample_weight)
            differ[~self.categorical] = np.ptp(numbers, axis=0) > 0
        self.problems = [
            f"X: these columns have {problem}: {', '.join(repr(self.names[i]) for i in chosen)}"
            for problem, chosen in (
                ("one value only: leave them out", np.flatnonzero(~differ)),
                (
                    "more categories than half the number of rows: convert them to numbers, or "
                    "name them in categorical",
                    np.flatnonzero(nearly_unique),
                ),
            )
            if len(chosen)
        ]
        return self._encoded(numbers, categories)

    @property
    def num_numbers(self) -> int:
        """The number of columns of numbers."""
        return int((~self.categorical).sum())

    def transform(self, X: Any) -> Table:
        """The rows of a table with the columns of the one that was learned from."""
        columns = columns_of(X)
        for i, own in self._types_of(columns).items():
            if own and (known := self._types[i]) and own != known:
                raise ValueError(
                    f"{self._place(i)}: categories of type {own}, and in fit they were of type "
                    f"{known}: convert them"
                )
        numbers = None if self.categorical.all() else self._numbers(columns)
        return self._encoded(numbers, self._categories(columns))

    def _encoded(self, numbers: np.ndarray | None, categories: np.ndarray) -> Table:
        """The rows of columns of numbers, if there are any, and of categories."""
        scaled = np.zeros((len(categories), 0), np.float32)
        codes = np.zeros((len(categories), 0), np.int32)
        if numbers is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = self._scaler.transform(numbers).astype(np.float32)
            if not (finite := np.isfinite(scaled).all(axis=0)).all():
                column = int(np.flatnonzero(~self.categorical)[np.argmin(finite)])
                raise ValueError(
                    f"{self._place(column)}: a value is too far from those of fit for float32: "
                    "check it, or scale the column"
                )
        if self.categorical.any():
            given = self._codes.transform(categories).astype(np.int32)
            codes = np.where(given < 0, np.array(self.num_categories, np.int32), given)
        return Table(scaled, codes)

    def _place(self, column: int) -> str:
        return f"X: column {self.names[column]!r}"

    def _numbers(self, columns: Sequence[np.ndarray]) -> Float[np.ndarray, "b _"]:
        found = []
        for i in np.flatnonzero(~self.categorical).tolist():
            values = as_numbers(self._place(i), columns[i], "name the column in categorical")
            if missing := int(np.isnan(values).sum()):
                raise ValueError(
                    f"{self._place(i)}: {missing} of {len(values)} values are missing: fill them "
                    "in, for example by sklearn.impute.SimpleImputer"
                )
            found.append(values)
        return np.stack(found, axis=1)

    def _types_of(self, columns: Sequence[np.ndarray]) -> dict[int, str | None]:
        """The types of the categorical columns."""
        categorical = np.flatnonzero(self.categorical).tolist()
        return {i: type_of(self._place(i), columns[i]) for i in categorical}

    def _categories(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """The values of the categorical columns, None where they are missing."""
        found = np.empty((len(columns[0]), int(self.categorical.sum())), object)
        for at, i in enumerate(np.flatnonzero(self.categorical).tolist()):
            values = np.fromiter(as_list(columns[i]), object)
            values[is_missing(columns[i])] = None
            found[:, at] = values
        return found


def rows_of(X: Any) -> Any:
    """X as a DataFrame or an array of two axes."""
    X = as_pandas(X)
    if issparse(X):
        raise ValueError("X is sparse: give a dense array, X.toarray()")
    if not hasattr(X, "iloc"):
        try:
            array = as_array(X)
            # a list with numbers and texts would become texts, one with large integers floats
            X = (
                np.array(X, object)
                if array.dtype.kind in "USf" and not hasattr(X, "dtype")
                else array
            )
        except ValueError:
            raise ValueError("X: the rows have different lengths") from None
    if X.ndim != 2:
        raise ValueError(f"X has {X.ndim} axes: give rows (b, columns)")
    if not X.shape[0]:
        raise ValueError("X has 0 rows: at least 1 is needed")
    if not X.shape[1]:
        raise ValueError("X has 0 columns: at least 1 is needed")
    if hasattr(X, "iloc") and X.columns.has_duplicates:
        twice = X.columns[X.columns.duplicated()][0]
        raise ValueError(f"X: there are two columns {twice!r}: rename one")
    return X


def is_category(given: Any) -> bool:
    """Whether a column or a target has pandas' type "category"."""
    return getattr(getattr(given, "dtype", None), "name", None) == "category"


def columns_of(X: Any) -> list[np.ndarray]:
    """The columns of a DataFrame or an array."""
    if hasattr(X, "iloc"):
        return [as_values(f"X: column {name!r}", values) for name, values in X.items()]
    return [as_values(f"X: column {i}", values) for i, values in enumerate(X.T)]


class TableRows(nnx.Module):
    """Rows of a table as f[b d]: its numbers, and the embedding of each category.

    The embeddings of all columns are rows of one matrix. This is the same as a linear layer of
    one-hot codes, without the products with zeros. In each column, missing and unseen categories
    share an embedding, which starts at zero and is learned from rows where the category is missing.
    """

    def __init__(
        self, num_numbers: int, num_categories: Sequence[int], size: int, *, rngs: nnx.Rngs
    ):
        """
        Args:
            num_categories: number of categories of each categorical column.
            size: size of an embedding.
        """
        last = np.cumsum([n + 1 for n in num_categories]) - 1  # of missing and unseen categories
        self.offsets = tuple(int(at) - n for at, n in zip(last, num_categories, strict=True))
        self.width = num_numbers + size * len(num_categories)
        self.vectors = nnx.Embed(int(last[-1]) + 1, size, rngs=rngs) if num_categories else None
        if self.vectors is not None:
            self.vectors.embedding[...] = self.vectors.embedding[...].at[last].set(0.0)

    def __call__(self, table: Table) -> Float[Array, "b d"]:
        if self.vectors is None:
            return table.numbers
        vectors = self.vectors(table.codes + np.array(self.offsets, np.int32))
        return jnp.concatenate([table.numbers, vectors.reshape(len(vectors), -1)], axis=1)
