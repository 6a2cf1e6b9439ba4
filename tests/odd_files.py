"""Odd data files: those that must be refused, with the words without which the refusal is of no use, and those that
are read as declared, with their rows. Each is one kind of damage or one kind of oddness.

Used twice: on the reading functions and on the command line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GOOD = b'{"prompt": "1 + 1?", "completion": "2"}\n'
CSV = b"prompt,completion\n1 + 1?,2\n"
QA = {"prompt": "1 + 1?", "completion": "2"}
NEEDS_PYARROW = (".parquet", ".arrow", ".feather", ".ipc")
UTF16 = "prompt,completion\n안녕,하세요\n".encode("utf-16-le")


@dataclass(frozen=True)
class Odd:
    """content: bytes, or how to make them. mentions and row: of the refusal; rows: what is read when it is none."""

    name: str
    suffix: str
    content: bytes | Callable[[], bytes]
    mentions: tuple[str, ...] = ()
    row: int | None = None
    rows: list[dict] | None = None

    def bytes(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content()


def zstd(content: bytes, cut: int = 0) -> Callable[[], bytes]:
    def make() -> bytes:
        from backports import zstd

        packed = zstd.compress(content)
        return packed[: len(packed) - cut]

    return make


def table(columns: dict[str, Any] | Callable[[], Any]) -> Any:
    import pyarrow as pa

    made = columns() if callable(columns) else columns
    return made if isinstance(made, pa.Table) else pa.table(made)


def parquet(
    columns: dict[str, Any] | Callable[[], Any], change: Callable[[bytes], bytes] = bytes
) -> Callable[[], bytes]:
    def make() -> bytes:
        from pyarrow import parquet as pq

        sink = io.BytesIO()
        pq.write_table(table(columns), sink, write_page_checksum=True, compression="none", use_dictionary=False)
        return change(sink.getvalue())

    return make


def arrow(columns: dict[str, Any], change: Callable[[bytes], bytes] = bytes, *, stream: bool) -> Callable[[], bytes]:
    def make() -> bytes:
        from pyarrow import ipc

        made, sink = table(columns), io.BytesIO()
        with (ipc.new_stream if stream else ipc.new_file)(sink, made.schema) as writer:
            writer.write_table(made)
        return change(sink.getvalue())

    return make


def typed(values: list, kind: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        import pyarrow as pa

        return {"prompt": ["a"] * len(values), "completion": pa.array(values, kind(pa))}

    return make


def two_columns_of_one_name() -> Any:
    import pyarrow as pa

    return pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])


def not_utf8() -> Any:
    import pyarrow as pa

    values = pa.array([b"fine", b"\xed\xa0\x80"], pa.binary())
    return {"prompt": ["a", "b"], "completion": pa.Array.from_buffers(pa.string(), 2, values.buffers())}


def flip(find: bytes) -> Callable[[bytes], bytes]:
    """One bit changed in the first place where `find` stands."""

    def change(content: bytes) -> bytes:
        at = content.index(find)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


COLUMNS = {"prompt": ["1 + 1?"], "completion": ["2"]}
MANY = {"prompt": ["1 + 1?"] * 5000, "completion": ["2"] * 5000}
LINES = b"".join(b"a%d,b\n" % n for n in range(60))

REFUSED_TABLES = [
    Odd("too_many_cells", ".csv", CSV + b"a,b,c\n", ("too many cells in line 3", "3 cells", "2 cells"), 2),
    Odd("too_few_cells", ".csv", CSV + b"a\n", ("too few cells in line 3", "1 cells", "prompt, completion"), 2),
    Odd("too_few_in_tsv", ".tsv", b"a\tb\n1\t2\n3\n", ("too few cells in line 3",), 2),
    Odd("open_quote", ".csv", CSV + b'a,"b\nc,d\n', ("opens cell 2 in line 3", "end of the file", "twice"), 2),
    Odd("open_quote_in_header", ".csv", b'prompt,"completion\na,b\n', ("opens cell 2 in line 1", "end of the"), None),
    Odd("after_quote", ".csv", CSV + b'"a" b,c\n', ("after the closing quote of cell 1 in line 3",), 2),
    Odd("quote_in_quoted", ".csv", CSV + b'"say "hi" now",c\n', ("after the closing quote", "twice"), 2),
    Odd("space_before_quote", ".csv", CSV + b'a, "b, c"\n', ("space before the quote of cell 2 in line 3",), 2),
    Odd("swallowed_rows", ".csv", CSV + b'"a,b\n' + LINES + b'c",d\n', ("swallows the 60 lines", "line 3"), 2),
    Odd("swallowed_in_tsv", ".tsv", b'a\tb\n"x\ty\n1\t2\n3\t4\nz"\tw\n', ("swallows the 2 lines below",), 1),
    Odd("one_name_twice", ".csv", b"prompt,prompt\na,b\n", ("header in line 1", "one name", "field prompt"), None),
    Odd("empty_name", ".csv", b"prompt,\na,b\n", ("column 2 of the header", "no name"), None),
    Odd("space_in_name", ".csv", b"prompt, completion\na,b\n", ("space around a name", "' completion'"), None),
    Odd("only_header", ".csv", b"prompt,completion\n", ("no rows",), None),
    Odd("blank_csv", ".csv", b"\r\n\r\n", ("no rows",), None),
    Odd("semicolons", ".csv", b"prompt;completion\na;b\n", ("semicolons instead of commas",), None),
    Odd("tabs_in_csv", ".csv", b"prompt\tcompletion\na\tb\n", ("tabs instead of commas", ".tsv"), None),
    Odd("commas_in_tsv", ".tsv", CSV, ("commas instead of tabs", ".csv"), None),
    Odd("json_in_csv", ".csv", GOOD, ("JSON under the name of a table", ".jsonl"), None),
    Odd("csv_in_jsonl", ".jsonl", CSV, ("not valid JSON", "column 1"), 1),
    Odd("old_mac_lines", ".csv", b"prompt,completion\ra,b\r", ("carriage return inside line 1",), None),
    Odd("return_in_cell", ".csv", CSV + b"a\rb,c\n", ("carriage return inside line 3",), 2),
    Odd("cp949_csv", ".csv", CSV + "안녕,하세요\n".encode("cp949"), ("byte offset 27", "CP949"), 2),
    Odd("latin1_in_quotes", ".csv", CSV + b'"a\nb\xe9",c\n', ("byte offset 31", "0xe9"), 2),
    Odd("web_page_csv", ".csv", b"<!DOCTYPE html>\n<html>,</html>\n", ("web page", "raw link"), None),
]
REFUSED_CONTAINERS = [
    Odd("utf16_csv", ".csv", b"\xff\xfe" + UTF16, ("UTF-16", "iconv"), None),
    Odd("utf16_without_mark", ".csv", "prompt,completion\na,b\n".encode("utf-16-le"), ("UTF-16", "UTF-16LE"), None),
    Odd("utf16_big_without_mark", ".jsonl", GOOD.decode().encode("utf-16-be"), ("UTF-16", "UTF-16BE"), None),
    Odd("utf32", ".jsonl", GOOD.decode().encode("utf-32"), ("UTF-32", "iconv"), None),
    Odd("zst_cut", ".jsonl.zst", zstd(GOOD * 99, 9), (".zst data", "cut off"), None),
    Odd("zst_damaged", ".jsonl.zst", lambda: zstd(GOOD)()[:12] + b"\xaa" * 40, (".zst data", "damaged"), None),
    Odd("bz2_cut", ".csv.bz2", bz2.compress(CSV)[:-9], (".bz2 data", "cut off"), None),
    Odd("bz2_damaged", ".csv.bz2", flip(b"1AY&SY")(bz2.compress(CSV)), (".bz2 data", "damaged"), None),
    Odd("csv_gz_cut", ".csv.gz", gzip.compress(CSV * 999)[:-12], (".gz data", "cut off"), None),
    Odd("md_xz_cut", ".md.xz", lzma.compress(b"# Title\n" * 99)[:-20], (".xz data", "cut off"), None),
    Odd("plain_named_zst", ".jsonl.zst", GOOD, ("zstd data", "remove .zst"), None),
    Odd("gz_in_gz", ".jsonl.gz", gzip.compress(gzip.compress(GOOD)), ("inside", "gzip data"), None),
    Odd("parquet_in_gz", ".jsonl.gz", gzip.compress(b"PAR1...."), ("inside", "a Parquet file"), None),
    Odd("zst_named_plain", ".jsonl", zstd(GOOD), ("zstd data", "ends in .zst"), None),
    Odd("garbage_after_gz", ".jsonl.gz", gzip.compress(GOOD) + b"garbage", (".gz data", "damaged"), None),
    Odd("excel", ".csv", b"PK\x03\x04[Content_Types]", ("Excel", "CSV UTF-8"), None),
    Odd("sqlite", ".txt", b"SQLite format 3\0....", ("SQLite",), None),
    Odd("pdf", ".txt", b"%PDF-1.7\n", ("a PDF", ".txt"), None),
    Odd("pickle", ".jsonl", b"\x80\x04\x95\x00", ("pickle", "JSONL"), None),
    Odd("pickle_suffix", ".pkl", b"\x80\x04\x95\x00", ("unknown kind of file", ".pkl"), None),
    Odd("packed_parquet", ".parquet.gz", b"\x1f\x8b", ("unknown kind", ".parquet.gz", "unpack it"), None),
    Odd("lfs_parquet", ".parquet", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",), None),
    Odd("json_in_txt", ".txt", GOOD * 2, ("JSON rows under the name of plain text", ".jsonl"), 1),
    Odd("json_array_in_md", ".md", b"[" + GOOD + b"]", ("JSON rows under the name of plain text",), 1),
    Odd("web_page_txt", ".txt", b"\xef\xbb\xbf \n<html><body>404</body></html>", ("web page", "raw link"), None),
    Odd("blank_md", ".md", b"\n \n", ("no rows",), None),
    Odd("json_row_of_numbers", ".ndjson", GOOD + b"7\n", ("JSON object", "number 7"), 2),
]
REFUSED_COLUMNS = [
    Odd("zero_parquet", ".parquet", b"", ("0 bytes",), None),
    Odd("text_named_parquet", ".parquet", CSV, ("a Parquet file", "bytes b'prompt,c"), None),
    Odd("arrow_named_parquet", ".parquet", arrow(COLUMNS, stream=False), ("an Arrow file", ".arrow"), None),
    Odd("parquet_cut", ".parquet", parquet(MANY, lambda c: c[:-20]), (".parquet data", "damaged"), None),
    Odd("parquet_middle_gone", ".parquet", parquet(MANY, lambda c: c[:99] + c[5000:]), ("damaged",), None),
    Odd("parquet_bit_flipped", ".parquet", parquet(MANY, flip(b"1 + 1?\x06\x00\x00\x001")), ("damaged", "CRC"), None),
    Odd("parquet_no_rows", ".parquet", parquet({"text": []}), ("no rows",), None),
    Odd("parquet_no_columns", ".parquet", parquet({}), ("without columns",), None),
    Odd("parquet_one_name", ".parquet", parquet(two_columns_of_one_name), ("one name", "field text"), None),
    Odd("parquet_bytes", ".parquet", parquet(typed([b"x"], lambda pa: pa.binary())), ("binary", "completion"), None),
    Odd("parquet_not_utf8", ".parquet", parquet(not_utf8), ("not UTF-8", "completion"), 2),
    Odd("parquet_nan", ".parquet", parquet(typed([1.0, float("nan")], lambda pa: pa.float64())),
        ("not a JSON number", "field completion", "nan"), 2),
    Odd("parquet_inf_inside", ".parquet",
        parquet(typed([[1.0], [2.0, float("inf")]], lambda pa: pa.list_(pa.float32()))),
        ("not a JSON number", "completion[1]", "inf"), 2),
    Odd("parquet_image", ".parquet",
        parquet(typed([{"bytes": b"x", "path": "a"}],
                      lambda pa: pa.struct({"bytes": pa.binary(), "path": pa.string()}))),
        ("completion.bytes", "binary"), None),
    Odd("parquet_duration", ".parquet", parquet(typed([5], lambda pa: pa.duration("s"))), ("duration",), None),
    Odd("arrow_cut", ".arrow", arrow(MANY, lambda c: c[:-30], stream=False), (".arrow data", "damaged"), None),
    Odd("stream_cut_inside", ".arrow", arrow(MANY, lambda c: c[:-300], stream=True), ("cut off",), None),
    Odd("stream_without_end", ".arrow", arrow(MANY, lambda c: c[:-8], stream=True), ("cut off", "end mark"), None),
    Odd("feather_one", ".feather", b"FEA1........", ("version 1", "write_feather"), None),
]  # fmt: skip

READ = [
    Odd("words", ".csv", b"prompt,completion\nnull,NA\n0012,1e5\nTRUE,\nNaN,-Infinity\n 1 ,\xc2\xa0\n",
        rows=[{"prompt": a, "completion": b}
              for a, b in [("null", "NA"), ("0012", "1e5"), ("TRUE", ""), ("NaN", "-Infinity"), (" 1 ", "\xa0")]]),
    Odd("bom", ".csv", b"\xef\xbb\xbf" + CSV, rows=[QA]),
    Odd("quoted_bom", ".csv", b'\xef\xbb\xbf"prompt","completion"\r\n"1 + 1?","2"\r\n', rows=[QA]),
    Odd("windows_lines", ".csv", CSV.replace(b"\n", b"\r\n"), rows=[QA]),
    Odd("no_last_line_end", ".csv", CSV[:-1], rows=[QA]),
    Odd("blank_lines_between", ".csv", CSV.replace(b"\n", b"\n\n\r\n"), rows=[QA]),
    Odd("quotes", ".csv", b'prompt,completion\n"a ""b"" c","x,\r\ny\n"\n"""",a"b\n"",""""""\n',
        rows=[{"prompt": 'a "b" c', "completion": "x,\r\ny\n"}, {"prompt": '"', "completion": 'a"b'},
              {"prompt": "", "completion": '""'}]),
    Odd("line_separator", ".csv", "prompt,completion\na\u2028b\u0085\x0b,c\x1c\n".encode(),
        rows=[{"prompt": "a\u2028b\u0085\x0b", "completion": "c\x1c"}]),
    Odd("one_column", ".csv", b'text\na;b\n""\n', rows=[{"text": "a;b"}, {"text": ""}]),
    Odd("tsv", ".tsv", b'prompt\tcompletion\n1 + 1?\t2\n5\'10" tall, he said "no"\tb\n',
        rows=[QA, {"prompt": '5\'10" tall, he said "no"', "completion": "b"}]),
    Odd("long_cell", ".csv", b"text\n" + b"x" * 300_000 + b"\n", rows=[{"text": "x" * 300_000}]),
    Odd("code_in_cell", ".csv", b'prompt,completion\n"a, b\nc, d\n",e\n',
        rows=[{"prompt": "a, b\nc, d\n", "completion": "e"}]),
    Odd("upper", ".CSV", CSV, rows=[QA]),
    Odd("csv_gz", ".csv.gz", gzip.compress(CSV), rows=[QA]),
    Odd("csv_bz2", ".csv.bz2", bz2.compress(CSV), rows=[QA]),
    Odd("tsv_xz", ".tsv.xz", lzma.compress(b"a\tb\n1\t2\n"), rows=[{"a": "1", "b": "2"}]),
    Odd("jsonl_zst", ".jsonl.zst", zstd(GOOD), rows=[QA]),
    Odd("two_frames", ".jsonl.zst", lambda: zstd(GOOD)() + zstd(GOOD)(), rows=[QA, QA]),
    Odd("ndjson", ".ndjson", GOOD, rows=[QA]),
    Odd("huge_integer", ".jsonl", b'{"text": "a", "id": 123456789012345678901234567890}\n',
        rows=[{"text": "a", "id": 123456789012345678901234567890}]),
    Odd("separator_in_jsonl", ".jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False).encode(),
        rows=[{"text": "a\u2028b"}]),
    Odd("markdown", ".md", b"---\ntitle: x\n---\n# A\n\ntext  \n",
        rows=[{"text": "---\ntitle: x\n---\n# A\n\ntext  \n"}]),
    Odd("text_with_brackets", ".txt", b"[1] a footnote\n{not json}\n", rows=[{"text": "[1] a footnote\n{not json}\n"}]),
    Odd("parquet", ".parquet", parquet(COLUMNS), rows=[QA]),
    Odd("feather", ".feather", arrow(COLUMNS, stream=False), rows=[QA]),
    Odd("stream", ".arrow", arrow(COLUMNS, stream=True), rows=[QA]),
    Odd("parquet_words", ".parquet", parquet({"a": ["null", "NA", "0012", None, ""]}),
        rows=[{"a": a} for a in ("null", "NA", "0012", None, "")]),
    Odd("parquet_turns", ".parquet", parquet({"messages": [[{"role": "user", "content": "a"}], []]}),
        rows=[{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]),
    Odd("parquet_categories", ".parquet",
        parquet(typed(["x", "y"], lambda pa: pa.dictionary(pa.int8(), pa.string()))),
        rows=[{"prompt": "a", "completion": "x"}, {"prompt": "a", "completion": "y"}]),
    Odd("parquet_map", ".parquet", parquet(typed([[("k", 1)]], lambda pa: pa.map_(pa.string(), pa.int8()))),
        rows=[{"prompt": "a", "completion": {"k": 1}}]),
    Odd("parquet_date", ".parquet", parquet(typed([0], lambda pa: pa.date32())),
        rows=[{"prompt": "a", "completion": "1970-01-01"}]),
    Odd("parquet_time", ".parquet", parquet(typed([0], lambda pa: pa.timestamp("s", "UTC"))),
        rows=[{"prompt": "a", "completion": "1970-01-01 00:00:00.000Z"}]),
    Odd("parquet_decimal", ".parquet", parquet(typed(["1.50"], lambda pa: pa.string())),
        rows=[{"prompt": "a", "completion": "1.50"}]),
    Odd("half_floats", ".arrow",
        arrow({"text": ["a"], "n": [0.5]}, stream=False), rows=[{"text": "a", "n": 0.5}]),
]  # fmt: skip

REFUSED: list[Odd] = [*REFUSED_TABLES, *REFUSED_CONTAINERS, *REFUSED_COLUMNS]
