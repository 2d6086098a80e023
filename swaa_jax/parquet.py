"""What parquet files say of themselves, and what they make of records: for `records.py`."""

from collections.abc import Sequence
from typing import Any

from swaa_jax.limits import PARQUET_BYTES, PARQUET_TIMES

__all__ = ["problem_with_groups", "said_once", "without_invented_nulls"]


def said_once(metadata: Any) -> list[str]:
    """Columns of texts that the file has a dictionary of."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    found = []
    for at in range(metadata.num_columns):
        chunks = [group.column(at) for group in groups]
        if all(
            chunk.physical_type == "BYTE_ARRAY"
            and chunk.has_dictionary_page
            and chunk.total_uncompressed_size < PARQUET_BYTES
            for chunk in chunks
        ):
            found.append(metadata.schema.column(at).path)
    return found


def problem_with_groups(groups: Sequence[Any], size: int) -> str | None:
    """What is wrong with row groups that would take far more memory than the file is long.

    Args:
        groups: of the file's metadata.
        size: bytes of the file.
    """
    limit = max(PARQUET_BYTES, PARQUET_TIMES * size)
    for number, group in enumerate(groups):
        # An entry of a column takes some bytes even where it is null.
        columns = [group.column(at) for at in range(group.num_columns)]
        entries = sum(max(column.num_values, group.num_rows) for column in columns)
        needed = group.total_byte_size + 8 * entries
        if needed > limit:
            return (
                f"row group {number}: expected at most {limit >> 20} MB of records in a file of "
                f"{size} bytes, got {needed >> 20} MB; write it again in smaller row groups"
            )
    return None


def without_invented_nulls(value: Any, kind: Any) -> Any:
    """A value without the nested keys that are null because other records have them.

    A parquet file has every key in every record. What was absent cannot be told from a null, which
    hardly anybody writes; but a key that is null in all records is there because it was written.
    """
    import pyarrow

    types = pyarrow.types
    if value is None:
        return None
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return {
            field.name: without_invented_nulls(value[field.name], field.type)
            for field in fields
            if value[field.name] is not None or types.is_null(field.type)
        }
    if types.is_map(kind):
        return [(key, without_invented_nulls(item, kind.item_type)) for key, item in value]
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    if any(getattr(types, f"is_{name}")(kind) for name in lists):
        return [without_invented_nulls(item, kind.value_type) for item in value]
    return value
