"""Memories as rows of Parquet files, which any reader of Parquet can read."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
COLUMNS = {
    "source": pa.string(),  # path of the input file
    "place": pa.int64(),  # byte the line begins at (of the file unpacked), or row number
    "id": pa.string(),
    "rest": pa.string(),  # the row's other fields, as JSON
    "origin_tokens": pa.int64(),
    "soft_tokens": pa.int64(),
    "memory": pa.large_binary(),  # soft tokens (M, d), row by row, little-endian
    "scale": pa.large_binary(),  # of the form int8: one fp32 number per soft token
    "group_sizes": pa.large_binary(),  # one int32 per soft token, how many tokens it stands for; null: the merge size
}


def pack(soft: Tensor, form: str, group_sizes: Tensor | None = None) -> dict[str, bytes]:
    """Soft tokens (M, d) as the bytes of the columns `memory`, `scale` for int8, and `group_sizes` where there are."""
    soft = soft.detach().cpu()
    tensors = [soft.to(FORMS[form])]
    if form == "int8":
        scale = (soft.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # (M, 1)
        tensors = [(soft.float() / scale).round().to(torch.int8), scale]
    named = dict(zip(("memory", "scale"), tensors, strict=False))
    if group_sizes is not None:
        named["group_sizes"] = group_sizes.int()
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in named.items()}


def unpack(row: dict[str, Any], form: str) -> Tensor:
    """Soft tokens (M, d) of a row: fp32, or bf16 for the form bfloat16."""
    soft = torch.frombuffer(bytearray(row["memory"]), dtype=FORMS[form]).view(row["soft_tokens"], -1)
    if form == "int8":
        soft = soft.float() * torch.frombuffer(bytearray(row["scale"]), dtype=torch.float32)[:, None]
    return soft


def group_sizes_of(row: dict[str, Any]) -> Tensor | None:
    """The group sizes of a row, if it has any."""
    sizes = row.get("group_sizes")
    return None if sizes is None else torch.frombuffer(bytearray(sizes), dtype=torch.int32)


def to_parquet(rows: list[dict[str, Any]], form: str, merge_size: int, fingerprint: str) -> memoryview:
    """Rows of COLUMNS as a file; its metadata says what the memories are, as gmsa.form and so on."""
    facts = {"gmsa.form": form, "gmsa.merge_size": str(merge_size), "gmsa.fingerprint": fingerprint}
    columns = [(name, kind) for name, kind in COLUMNS.items() if name != "scale" or form == "int8"]
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata=facts))
    small = [name for name, kind in columns if kind != pa.large_binary()]  # the others do not shrink
    codecs = {name: "zstd" if name in small else "none" for name, _ in columns}
    sink = pa.BufferOutputStream()
    options = {"compression": codecs, "use_dictionary": ["source"], "write_statistics": small}
    pq.write_table(table, sink, row_group_size=256, **options)
    return memoryview(sink.getvalue())


def read_rows(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a file."""
    for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches(64):
        yield from batch.to_pylist()
