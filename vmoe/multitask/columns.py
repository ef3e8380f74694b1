"""Tables: numeric and categorical columns, and their encoding for a model.

Scales, hashes and the choice of columns are scikit-learn's. Its ``OrdinalEncoder`` would replace
the counts and the look-up of ``Vocabulary`` alone: it reads no lists, shares no categories among
columns, and checks no types, such as dates in fit and numbers later.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.sparse import issparse
from sklearn.preprocessing import StandardScaler
from sklearn.utils import murmurhash3_32

from vmoe.classic.design import select_columns
from vmoe.multitask.as_json import from_json, to_json
from vmoe.multitask.values import (
    Distinct,
    as_array,
    as_list,
    as_numbers,
    as_pandas,
    as_values,
    distinct,
    is_category,
    is_numeric,
    type_of,
)

Column = Float[np.ndarray, "b"] | Distinct
MANY = 10  # as many categories are never too many, however few rows there are
SIZE = 8  # of an embedding


class Table(NamedTuple):
    """Rows of a table as a model reads them.

    A code is a row of a matrix of embeddings.

    Attributes:
        numbers: standardized columns.
        codes: the code of each categorical column.
        lists: for each column of lists the codes of its values; -1 after the last one.
    """

    numbers: Float[Any, "b _"]
    codes: Int[Any, "b _"]
    lists: tuple[Int[Any, "b _"], ...] = ()


@dataclass
class Vocabulary:
    """Categories of a column, or of several that share their embeddings.

    Attributes:
        size: size of an embedding.
        categories: sorted; empty with ``buckets``.
        buckets: number of values of the hash that replaces categories.
        type: see ``type_of``.
        matrix: the matrix of the embeddings, one for each size.
        first: the code of the first category. The codes of the others follow, and then that of
            missing and unknown ones.
    """

    size: int
    buckets: int = 0
    type: str | None = None
    categories: Sequence[Any] = ()
    matrix: int = 0
    first: int = 0

    def __len__(self) -> int:
        return self.buckets or len(self.categories)

    def learn(self, columns: Mapping[str, Distinct], min_frequency: int) -> None:
        """Learns the categories of columns.

        Args:
            columns: by place.
            min_frequency: the number of values that a category has at least.
        """
        counts = Counter[Any]()
        for place, column in columns.items():
            self.type = self._checked(place, column) or self.type
            found = np.bincount(column.index[column.index >= 0], minlength=len(column.values))
            for value, n in zip(as_list(column.values), found.tolist(), strict=True):
                counts[value] += n  # dates in nanoseconds may be equal in microseconds
        if not self.buckets:
            self.categories = sorted(x for x, n in counts.items() if n >= min_frequency)

    def _checked(self, place: str, column: Distinct) -> str | None:
        """The type of a column's values, which is that of the categories."""
        found = type_of(place, column.values)
        if found and self.type and found != self.type:
            raise ValueError(
                f"{place}: categories of type {found}, and in fit they were of type {self.type}: "
                "convert them"
            )
        return found

    def codes(self, place: str, column: Distinct) -> Int[np.ndarray, "b _"]:
        """The codes of a column."""
        self._checked(place, column)
        values = as_list(column.values)
        if self.buckets:
            offsets = [bucket(value, self.buckets) for value in values]
        else:
            known = {value: i for i, value in enumerate(self.categories)}
            offsets = [known.get(value, len(known)) for value in values]
        codes = self.first + np.array([*offsets, len(self)], np.int32)[column.index]
        if column.lists:
            codes[:, 1:][column.index[:, 1:] < 0] = -1
        return codes


def bucket(value: Any, buckets: int) -> int:
    """MurmurHash3 of a category's text in UTF-8, with seed 0, modulo the number of buckets.

    Equal numbers have the same text: True, 1 and 1.0 that of 1.
    """
    if isinstance(value, Real | np.bool_):
        number: Any = value
        value = int(number) if float(number).is_integer() else float(number)
    return murmurhash3_32(str(value), positive=True) % buckets


class TableEncoder:
    """Encodes a DataFrame or an array as a ``Table``.

    Attributes:
        names: the names of the columns, or their indices.
        vocabularies: those of the categorical columns.
        vocabulary_of: the vocabulary of each categorical column, both by index.
        lists: the indices of the columns of lists.
        scaler: of the columns of numbers.
        problems: what to warn of: columns of one value, and columns that are categorical by
            default and have more categories than half the number of rows.
    """

    def __init__(
        self,
        *,
        embedding_size: Any = SIZE,
        min_frequency: Any = 1,
        hash_buckets: Any = None,
        shared_embeddings: Any = None,
    ):
        """The arguments are those of ``MultiTaskEstimator``."""
        self._sizes, self._min_frequency = embedding_size, min_frequency
        self._buckets, self._shared = hash_buckets or {}, shared_embeddings or ()
        self.names: list[Hashable] = []
        self.vocabularies: list[Vocabulary] = []
        self.vocabulary_of: dict[int, int] = {}
        self.lists: set[int] = set()
        self.scaler = StandardScaler()
        self.problems: list[str] = []

    def fit_transform(
        self, X: Any, categorical: Any = None, sample_weight: np.ndarray | None = None
    ) -> Table:
        """Learns scales and categories; returns the rows.

        Args:
            sample_weight: how much each row counts in the scales; None for 1.
            categorical: names or indices of the categorical columns. By default those columns of a
                DataFrame that are not numbers, or have pandas' type "category".
        """
        default = hasattr(X, "iloc") and categorical is None
        self.names = list(X.columns) if hasattr(X, "iloc") else list(range(X.shape[1]))
        named: Any = np.full(len(self.names), None) if default else np.zeros(X.shape[1], bool)
        if categorical is not None:
            named[select_columns(categorical, X, "categorical")] = True
        columns = self._columns(X, named.tolist())
        coded = {i: each for i, each in enumerate(columns) if isinstance(each, Distinct)}
        self.lists = {i for i, column in coded.items() if column.lists}
        self._make_vocabularies(list(coded))
        for at, vocabulary in enumerate(self.vocabularies):
            own = {self._place(i): coded[i] for i, v in self.vocabulary_of.items() if v == at}
            vocabulary.learn(own, self._min_frequency)
        self._place_embeddings()
        if numbers := self._numbers(columns):
            with np.errstate(over="ignore", invalid="ignore"):
                self.scaler.fit(np.stack(numbers, axis=1), sample_weight=sample_weight)
        self.problems = self._find_problems(columns, len(X), default)
        return self._encoded(columns, len(X))

    def _columns(self, X: Any, categorical: Sequence[bool | None]) -> list[Column]:
        given = [X.iloc[:, i] for i in range(X.shape[1])] if hasattr(X, "iloc") else X.T
        return [column_of(self._place(i), each, categorical[i]) for i, each in enumerate(given)]

    def _make_vocabularies(self, categorical: Sequence[int]) -> None:
        """A vocabulary for each group of columns that share one, and for each other column."""
        sizes = self._sizes if isinstance(self._sizes, Mapping) else {}
        default = SIZE if isinstance(self._sizes, Mapping) else int(self._sizes)
        sizes = self._by_index("embedding_size", sizes, categorical)
        buckets = self._by_index("hash_buckets", self._buckets, categorical)
        groups = [self._indices("shared_embeddings", names, categorical) for names in self._shared]
        together = [i for group in groups for i in group]
        if len(set(together)) < len(together):
            raise ValueError(f"shared_embeddings={self._shared!r}: name each column once")
        self.vocabularies, vocabulary_of = [], dict[int, int]()
        for group in [*groups, *([i] for i in categorical if i not in together)]:
            ways = {(sizes.get(i, default), buckets.get(i, 0)) for i in group}
            if len(ways) > 1:
                raise ValueError(
                    f"shared_embeddings: {[self.names[i] for i in group]} differ in "
                    "embedding_size or hash_buckets: give them the same"
                )
            vocabulary_of |= dict.fromkeys(group, len(self.vocabularies))
            self.vocabularies.append(Vocabulary(*ways.pop()))
        self.vocabulary_of = dict(sorted(vocabulary_of.items()))

    def _place_embeddings(self) -> None:
        """Sets the matrix of each vocabulary, and its rows there."""
        rows: dict[int, int] = {}  # of the matrix of each size
        for vocabulary in self.vocabularies:
            vocabulary.first = rows.setdefault(vocabulary.size, 0)
            rows[vocabulary.size] += len(vocabulary) + 1
            vocabulary.matrix = list(rows).index(vocabulary.size)

    def _by_index(
        self, setting: str, given: Mapping[Hashable, Any], categorical: Sequence[int]
    ) -> dict[int, int]:
        """A setting by the index of the column."""
        for name, value in given.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{setting}: column {name!r}: {value!r}: use an integer from 1 on")
        indices = self._indices(setting, given, categorical)
        return dict(zip(indices, map(int, given.values()), strict=True))

    def _indices(
        self, setting: str, names: Iterable[Hashable], categorical: Sequence[int]
    ) -> list[int]:
        known = {self.names[i]: i for i in categorical}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{setting}: {name!r} is none of the categorical columns {list(known)}: name "
                    "one of them"
                )
        return [known[name] for name in names]

    def _find_problems(self, columns: Sequence[Column], rows: int, default: bool) -> list[str]:
        constant, unique = [], []
        for name, column in zip(self.names, columns, strict=True):
            if not isinstance(column, Distinct):
                constant += [name] * bool(np.ptp(column) == 0)
                continue
            n = len(column.values)
            constant += [name] * (n + bool((column.index < 0).any()) < 2)
            unique += [name] * (default and not column.lists and n > max(MANY, rows / 2))
        return [
            f"X: these columns have {problem}: {', '.join(map(repr, names))}"
            for problem, names in (
                ("one value only: leave them out", constant),
                (
                    "more categories than half the number of rows: convert them to numbers, or "
                    "name them in categorical",
                    unique,
                ),
            )
            if names
        ]

    def to_json(self) -> dict[str, Any]:
        """What ``transform`` needs, for ``json.dumps``; see ``as_json``.

        Raises:
            ValueError: a name or a category has a type that JSON cannot have.
        """
        scales = [self.scaler.mean_, self.scaler.scale_] if self.num_numbers else []
        numbers = iter(np.array(scales).T.tolist())
        columns = []
        for i, name in enumerate(self.names):
            column: dict[str, Any] = {"name": to_json("the name of a column", name)}
            if i in self.vocabulary_of:
                column |= {"vocabulary": self.vocabulary_of[i], "lists": i in self.lists}
            else:
                column["mean"], column["scale"] = next(numbers)
            columns.append(column)
        vocabularies = []
        for at, each in enumerate(self.vocabularies):
            place = self._place(next(i for i, own in self.vocabulary_of.items() if own == at))
            vocabularies.append(vars(each) | {"categories": to_json(place, list(each.categories))})
        return {"columns": columns, "vocabularies": vocabularies}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "TableEncoder":
        """The encoder of ``to_json``, for ``transform``.

        Raises:
            Exception: it is none.
        """
        made, columns = cls(), given["columns"]
        made.names = [from_json(column["name"]) for column in columns]
        for each in given["vocabularies"]:
            size, buckets, kind = each["size"], each["buckets"], each["type"]
            made.vocabularies.append(own := Vocabulary(size, buckets, kind))
            own.categories = from_json(each["categories"])
            values = np.fromiter(own.categories, object)
            if not (type(size) is int and type(buckets) is int and size > 0 <= buckets) or (
                own.categories != sorted(set(own.categories))
                or (len(values) and (buckets or type_of("its categories", values) != kind))
            ):
                raise ValueError("a vocabulary has other values than a fit gives it")
        made._place_embeddings()
        coded = {i: column for i, column in enumerate(columns) if "vocabulary" in column}
        made.vocabulary_of = {i: column["vocabulary"] for i, column in coded.items()}
        made.lists = {i for i, column in coded.items() if column["lists"]}
        known = set(range(len(made.vocabularies))) == set(made.vocabulary_of.values())
        if not known or len(set(made.names)) < len(columns):
            raise ValueError("two columns have one name, or a vocabulary has no column")
        numbers = [
            (each["mean"], each["scale"]) for i, each in enumerate(columns) if i not in coded
        ]
        if numbers:
            made.scaler.mean_, made.scaler.scale_ = np.array(numbers).T
            made.scaler.n_features_in_ = len(numbers)
            if not (np.isfinite(numbers).all() and (made.scaler.scale_ > 0).all()):
                raise ValueError("a column of numbers has no mean and scale")
        return made

    @property
    def num_numbers(self) -> int:
        """The number of columns of numbers."""
        return len(self.names) - len(self.vocabulary_of)

    def transform(self, X: Any) -> Table:
        """The rows of a table with the columns of the one that was learned from."""
        categorical = [i in self.vocabulary_of for i in range(X.shape[1])]
        return self._encoded(self._columns(X, categorical), len(X))

    def _encoded(self, columns: Sequence[Column], rows: int) -> Table:
        numbers = self._numbers(columns)
        scaled = np.zeros((rows, 0), np.float32)
        if numbers:
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = self.scaler.transform(np.stack(numbers, axis=1)).astype(np.float32)
            if not (finite := np.isfinite(scaled).all(axis=0)).all():
                own = [i for i in range(len(columns)) if i not in self.vocabulary_of]
                raise ValueError(
                    f"{self._place(own[int(np.argmin(finite))])}: a value is too far from those of "
                    "fit for float32: check it, or scale the column"
                )
        codes, lists = [np.zeros((rows, 0), np.int32)], []
        for i, at in self.vocabulary_of.items():
            column = columns[i]
            assert isinstance(column, Distinct)
            some = len(column.values) > 0  # a column of missing values may be either
            if some and column.lists != (i in self.lists):
                raise ValueError(
                    f"{self._place(i)}: {'lists' if column.lists else 'single values'}, and in fit "
                    f"{'single values' if column.lists else 'lists'}: convert them"
                )
            found = self.vocabularies[at].codes(self._place(i), column)
            (lists if i in self.lists else codes).append(found)
        return Table(scaled, np.concatenate(codes, axis=1), tuple(lists))

    def _numbers(self, columns: Sequence[Column]) -> list[Float[np.ndarray, "b"]]:
        found = []
        for i, values in enumerate(columns):
            if isinstance(values, Distinct):
                continue
            if missing := int(np.isnan(values).sum()):
                raise ValueError(
                    f"{self._place(i)}: {missing} of {len(values)} values are missing (NaN): fill "
                    "them in, for example by sklearn.impute.SimpleImputer"
                )
            found.append(values)
        return found

    def _place(self, column: int) -> str:
        return f"X: column {self.names[column]!r}"


def rows_of(X: Any) -> Any:
    """X as a DataFrame or an array of two axes.

    Some errors are in the words that scikit-learn's checks of estimators look for.
    """
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
        raise ValueError(f"X has {X.ndim} axes: Reshape your data to rows (b, columns)")
    if not X.shape[0]:
        raise ValueError("X has 0 rows: at least 1 is needed")
    if not X.shape[1]:
        raise ValueError(f"X has 0 feature(s) (shape={X.shape}) while a minimum of 1 is required.")
    if not hasattr(X, "iloc") and np.iscomplexobj(X):
        raise ValueError("X: Complex data not supported: give real and imaginary parts as columns")
    if hasattr(X, "iloc") and X.columns.has_duplicates:
        twice = X.columns[X.columns.duplicated()][0]
        raise ValueError(f"X: there are two columns {twice!r}: rename one")
    return X


def column_of(place: str, given: Any, categorical: bool | None) -> Column:
    """A column as numbers, NaN where they are missing, or as distinct values.

    Args:
        categorical: None to decide by the type.
    """
    remedy = "name the column in categorical"
    if not categorical and given.dtype.kind in "iuf":
        return as_numbers(place, as_values(place, given), remedy)
    column = distinct(place, given)
    if categorical is None:
        categorical = is_category(given) or column.lists or not is_numeric(column.values)
    if categorical:
        return column
    if column.lists:
        raise ValueError(f"{place}: a value is a list: {remedy}")
    return np.append(as_numbers(place, column.values, remedy), np.nan)[column.index[:, 0]]


class TableRows(nnx.Module):
    """Rows of a table as f[b d]: its numbers, and the embeddings of categories.

    All embeddings of one size are rows of one matrix. This is the same as a linear layer of one-hot
    codes, without the products with zeros. Missing and unknown categories of a column, or of
    several that share their embeddings, have one together, which starts at zero and is learned from
    rows of ``fit`` with such a category. Of a list, it is the mean of the embeddings of its values.
    """

    def __init__(self, encoder: TableEncoder, *, rngs: nnx.Rngs):
        of = {i: encoder.vocabularies[at] for i, at in encoder.vocabulary_of.items()}
        single = [vocabulary.matrix for i, vocabulary in of.items() if i not in encoder.lists]
        self.width = encoder.num_numbers + sum(vocabulary.size for vocabulary in of.values())
        self.lists = tuple(vocabulary.matrix for i, vocabulary in of.items() if i in encoder.lists)
        self.vectors, columns = nnx.List(), list[tuple[int, ...]]()
        for matrix in sorted({vocabulary.matrix for vocabulary in encoder.vocabularies}):
            own = [each for each in encoder.vocabularies if each.matrix == matrix]
            last = np.array([each.first + len(each) for each in own])  # of missing and unknown ones
            vectors = nnx.Embed(int(last[-1]) + 1, own[0].size, rngs=rngs)
            vectors.embedding[...] = vectors.embedding[...].at[last].set(0.0)
            self.vectors.append(vectors)
            columns.append(tuple(i for i, each in enumerate(single) if each == matrix))
        self.columns = tuple(columns)

    def __call__(self, table: Table) -> Float[Array, "b d"]:
        parts, rows = [table.numbers], len(table.numbers)
        for vectors, columns in zip(self.vectors, self.columns, strict=True):
            if columns:
                own = vectors.embedding[...][table.codes[:, np.array(columns)]]
                parts.append(own.reshape(rows, -1))
        for codes, matrix in zip(table.lists, self.lists, strict=True):
            used = (codes >= 0)[..., None]
            own = self.vectors[matrix].embedding[...][codes]
            total = jnp.where(used, own, 0).sum(1)
            parts.append(total / used.sum(1))
        return jnp.concatenate(parts, axis=1)
