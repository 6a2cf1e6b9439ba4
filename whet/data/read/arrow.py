"""Read Parquet, Arrow and Feather files as records, a batch at a time.

Values of a JSON kind come out as JSON has them: text, numbers, booleans, null, lists, objects (structs, and maps from
text). Dates, times and decimals have no JSON kind and come out as their exact text (2024-01-31, 12:30:00, 1.50).
Bytes, and other types without a text, are refused by name. A field that is absent in a row is null: these formats know
no absent field.
Batches are validated before they are used, because offsets in a damaged file may point anywhere. Memory holds one
batch, whose size in an Arrow file was decided when it was written. The file is not mapped into memory: a mapped file
that becomes shorter ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from whet.base.errors import UserError
from whet.base.extras import require
from whet.data.read.jsonl import check_leaves
from whet.data.read.record import COPY_AGAIN, Record
from whet.data.read.unpack import WatchedFile, check_growth

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_DROP = "drop the column, or save it as text or numbers"


def read_parquet(disk: WatchedFile, file: str) -> Iterator[Record]:
    """The rows of a Parquet file; pages with a checksum are checked against it."""
    from pyarrow import parquet

    with parquet.ParquetFile(
        disk, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
    ) as table:
        check_growth(table.metadata.num_rows, disk.size, file)  # a row has a byte at the least
        yield from _records(table.schema_arrow, table.iter_batches(batch_size=BATCH_ROWS), disk.size, file)


def read_arrow(disk: WatchedFile, file: str) -> Iterator[Record]:
    """The rows of an Arrow file (also called Feather or IPC) or stream (as `datasets` saves it)."""
    from pyarrow import ipc

    if disk.read(6) == b"ARROW1":
        disk.seek(0)
        with ipc.open_file(disk) as table:
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
            yield from _records(table.schema, batches, disk.size, file)
        return
    disk.seek(-len(_END_OF_STREAM), 2)
    end = disk.read(len(_END_OF_STREAM))
    if end != _END_OF_STREAM:  # the format allows it, but then a file that was cut off looks whole
        fix = f"{COPY_AGAIN}, or write it again and close the writer"
        raise UserError(
            "the Arrow stream is cut off", fix, file, found=f"{end.hex()} at the end", expected="its end mark"
        )
    disk.seek(0)
    with ipc.open_stream(disk) as table:
        yield from _records(table.schema, iter(table), disk.size, file)


def damage() -> tuple[type[Exception], ...]:
    """The exceptions that pyarrow raises for files that break their format."""
    require("pyarrow", "a Parquet or Arrow file")
    from pyarrow import ArrowException

    return (ArrowException, OverflowError, UnicodeDecodeError)


def _records(schema: pa.Schema, batches: Iterator[pa.RecordBatch], size: int, file: str) -> Iterator[Record]:
    names: list[str] = schema.names
    if not names:
        raise UserError("a table without columns", "save it again with its columns", file)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError("two columns have one name", "rename or remove one", file, field=twice)
    targets = [_target(field.type, field.name, file) for field in schema]
    floats = [name for name, target in zip(names, targets, strict=True) if _has_floats(target)]
    row = 0
    for batch in batches:
        check_growth(row + batch.num_rows, size, file)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            _validate(part, names, row, file)
            columns = [
                _values(column, target, name, row, file)
                for column, target, name in zip(part.columns, targets, names, strict=True)
            ]
            for cells in zip(*columns, strict=True):
                row += 1
                value = dict(zip(names, cells, strict=True))
                if floats:
                    _check_numbers(value, floats, file, row)
                yield Record(value, file, row, columnar=True)


def _validate(part: pa.RecordBatch, names: list[str], row: int, file: str) -> None:
    """Refuse offsets that lead out of the data and text that is not UTF-8, with the row if it can be told."""
    for name, column in zip(names, part.columns, strict=True):
        if _is_valid(column):
            continue
        bad = next((index for index in range(len(column)) if not _is_valid(column.slice(index, 1))), 0)
        problem = "the value is damaged, or is text that is not UTF-8"
        raise UserError(problem, COPY_AGAIN, file, row + bad + 1, field=name, found=str(column.type))


def _is_valid(column: pa.Array) -> bool:
    from pyarrow import ArrowInvalid

    try:
        column.validate(full=True)
    except ArrowInvalid:
        return False
    return True


def _values(column: pa.Array, target: pa.DataType, name: str, row: int, file: str) -> list[Any]:
    """The column as plain Python values."""
    from pyarrow import ArrowException

    try:
        if column.type != target:
            column = column.cast(target)
        return column.to_pylist(maps_as_pydicts="strict")
    except (ArrowException, KeyError, ValueError) as error:
        span = f"rows {row + 1} to {row + len(column)} of type {column.type}: {error}"
        raise UserError("values that cannot be read", _DROP, file, row + 1, field=name, found=span) from error


def _check_numbers(value: dict, names: list[str], file: str, row: int) -> None:
    try:
        check_leaves({name: value[name] for name in names})
    except UserError as error:
        error.file, error.row = file, row
        raise


def _target(kind: Any, path: str, file: str) -> Any:
    """The type to read a column as, all of whose values JSON could hold; UserError where there is none."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if _plain(types, kind):
        return pa.float32() if types.is_float16(kind) else kind
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_dictionary(kind):
        return _target(kind.value_type, path, file)
    if types.is_fixed_size_list(kind):
        return pa.list_(_target(kind.value_type, f"{path}[]", file), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_target(kind.value_type, f"{path}[]", file))
    if types.is_list(kind):
        return pa.list_(_target(kind.value_type, f"{path}[]", file))
    if types.is_struct(kind):
        fields = list(kind)
        if len({field.name for field in fields}) < len(fields):
            raise UserError("two fields of an object have one name", "rename or remove one", file, field=path)
        return pa.struct([(field.name, _target(field.type, f"{path}.{field.name}", file)) for field in fields])
    if types.is_map(kind) and (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
        return pa.map_(kind.key_type, _target(kind.item_type, f"{path}.*", file))
    return _refuse(kind, path, file)


def _plain(types: Any, kind: Any) -> bool:
    tests: tuple[Callable[[Any], bool], ...] = (
        types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _refuse(kind: Any, path: str, file: str) -> Any:
    expected = "text, numbers, booleans, dates, lists or objects"
    raise UserError("a column of a type that has no text", _DROP, file, field=path, found=str(kind), expected=expected)


def _has_floats(kind: Any) -> bool:
    from pyarrow import types

    if types.is_floating(kind):
        return True
    if types.is_struct(kind):
        return any(_has_floats(field.type) for field in kind)
    if types.is_map(kind):
        return _has_floats(kind.item_type)
    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return nested and _has_floats(kind.value_type)
