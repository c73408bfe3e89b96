"""clusters.parquet and tokens.parquet: what `emotrain cluster` found about documents of a data set.

    clusters.parquet   one row a document, by ascending `index`
        index      int64    id of the document in its data set (`Dataset.locate`)
        domain     string
        length     int64    tokens of the whole document, EOS included
        tokens     int64    those that were read, from its start
        cluster    int32    from 0, the largest; clusters of documents
        distance   float32  1 - cosine to the middle of its cluster: 0 is the middle, 2 the most
        x, y       float32  the two first principal components of its mean routing

    tokens.parquet     one row a token that was read, by document and position
        index, position    int64    the document, and the place in it from 0
        token              int64    its id
        cluster, distance  int32, float32   as above; clusters of tokens, which are other ones

Both carry, as the schema's metadata under `emotrain.clusters`, a JSON object: the data set
(`data`, its folder; `split`; `fingerprint`) and the model (`checkpoint`, its folder;
`checkpoint_fingerprint`; `step`). Documents are found again by it, and refused where they changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emotrain.data.formats import Dataset
from emotrain.errors import MissingFileError, UserError
from emotrain.files import json_text, write_whole

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"emotrain.clusters"
FORMAT = 1
DOCUMENTS, TOKENS = "clusters.parquet", "tokens.parquet"
"""Names of the files."""

DOCUMENT_COLUMNS = {
    "index": "int64",
    "domain": "string",
    "length": "int64",
    "tokens": "int64",
    "cluster": "int32",
    "distance": "float32",
    "x": "float32",
    "y": "float32",
}
TOKEN_COLUMNS = {
    "index": "int64",
    "position": "int64",
    "token": "int64",
    "cluster": "int32",
    "distance": "float32",
}
"""Columns and their Arrow types, in order."""


@dataclass(frozen=True)
class Origin:
    """What was clustered."""

    data: str
    """Folder of the data set, where it was."""
    split: str
    fingerprint: str
    """Of the split, see `Dataset.fingerprint`."""
    checkpoint: str
    """Folder of the model, where it was."""
    checkpoint_fingerprint: str
    """Checksum of its manifest."""
    step: int

    def open(self, verify_checksums: bool = True) -> Dataset:
        """The data set.

        Raises:
            UserError: it is not there any more, or holds other documents.
        """
        if not Path(self.data).is_dir():
            raise MissingFileError(
                f"{self.data}: the data set that was clustered is not there any more; put it back, "
                f"or run `emotrain cluster` where it is now"
            )
        dataset = Dataset(self.data, verify_checksums=verify_checksums)
        if dataset.fingerprint(self.split) != self.fingerprint:
            raise UserError(
                f"{self.data}: its {self.split} documents are not those that were clustered; "
                f"restore them, or run `emotrain cluster` on them again"
            )
        return dataset


@dataclass(frozen=True)
class ClusterFile:
    """One of the two files, read."""

    origin: Origin
    columns: Mapping[str, np.ndarray]
    """The columns by name; strings as objects."""


def write_columns(
    path: Path, types: Mapping[str, str], columns: Mapping[str, Any], origin: Origin
) -> Path:
    """Write a file of `types`, which are DOCUMENT_COLUMNS or TOKEN_COLUMNS, as a whole; returns its
    path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = json_text({"format": FORMAT, **asdict(origin)}).encode()
    table = pa.table(
        [pa.array(columns[name], type=arrow_type) for name, arrow_type in _schema(types)],
        schema=pa.schema(_schema(types), metadata={METADATA: about}),
    )
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return write_whole(path, stream.getvalue())


def read_columns(path: Path, types: Mapping[str, str]) -> ClusterFile:
    """Read a file of `types`; nothing in it is trusted.

    Raises:
        UserError: no such file, not one of ours, or rows that cannot be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; `emotrain cluster` writes it")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if list(zip(schema.names, schema.types, strict=True)) != _schema(types):
                raise ValueError(f"its columns are not {', '.join(types)}")
            origin = _origin((schema.metadata or {}).get(METADATA, b""))
            table = file.read()
        if any(column.null_count for column in table.columns):
            raise ValueError("it has null values")
        columns = {name: table[name].to_numpy() for name in types}
        order = np.diff(columns["index"])
        one_row_each = types is DOCUMENT_COLUMNS
        if (columns["index"] < 0).any() or (order < int(one_row_each)).any():
            raise ValueError("its documents are not in order")
        if (columns["cluster"] < 0).any():
            raise ValueError("it has a cluster below 0")
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a file of `emotrain cluster` ({reason}); write it again"
        ) from None
    return ClusterFile(origin, columns)


def documents_of_cluster(
    path: Path, cluster: int, domain: str = "", verify_checksums: bool = True
) -> tuple[Dataset, str, Iterator[np.ndarray]]:
    """The data set that clusters.parquet is about, its split, and the whole documents of one of its
    clusters, by ascending id: token ids of each, EOS last.

    Args:
        domain: only documents of this one; empty takes all.
    Raises:
        UserError: of `read_columns` and `Origin.open`, or no such cluster.
    """
    found = read_columns(path, DOCUMENT_COLUMNS)
    dataset = found.origin.open(verify_checksums)
    of_cluster = found.columns["cluster"] == cluster
    if not of_cluster.any():
        number = int(found.columns["cluster"].max(initial=-1)) + 1
        raise UserError(f"{path}: has no cluster {cluster}; its clusters are 0 to {number - 1}")
    if domain:
        of_cluster &= found.columns["domain"] == domain
    ids = found.columns["index"][of_cluster]
    return dataset, found.origin.split, read_documents(dataset, ids)


def read_documents(dataset: Dataset, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """Documents by their ids: token ids of each, a read-only view [length], EOS last.

    Raises:
        UserError: an id that the data set does not have.
    """
    for document_id in ids:
        split, index, row = dataset.locate(int(document_id))
        shard = dataset.shard(split, index)
        yield shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]


def _schema(types: Mapping[str, str]) -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    return [(name, pa.type_for_alias(alias)) for name, alias in types.items()]


def _origin(text: bytes) -> Origin:
    """Raises: ValueError, for anything that `write_columns` does not write."""
    try:
        about = json.loads(text)
    except RecursionError:
        raise ValueError("it does not say what was clustered") from None
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    kinds = {field.name: int if field.name == "step" else str for field in fields(Origin)}
    if about.keys() != kinds.keys() or any(type(about[k]) is not kinds[k] for k in kinds):
        raise ValueError("it does not say what was clustered")
    if about["split"] not in ("train", "valid"):
        raise ValueError(f"split {about['split']!r} is not known")
    return Origin(**about)
