"""Parquet files: read row group by row group, and refused by name where they cannot be read."""

import sys

import pytest

from polygpt.data import DataConfig, Tally, open_source
from polygpt.errors import RequestError

arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'polygpt[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"row {i} é" for i in range(1000)]


@pytest.fixture
def written(tmp_path):
    """`written(columns)`: the path of a parquet file."""

    def write(columns, name="a.parquet", row_group_size=300, **options):
        parquet.write_table(arrow.table(columns), tmp_path / name, row_group_size=row_group_size, **options)
        return str(tmp_path / name)

    return write


def texts(path, **settings):
    return [document.text for document in open_source(DataConfig(path=path, **settings))]


@pytest.mark.parametrize(
    "kind",
    [
        arrow.string(),
        arrow.large_string(),
        arrow.string_view(),
        arrow.dictionary(arrow.int32(), arrow.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_any_column_of_text_is_read(written, kind, compression):
    path = written({"id": list(range(1000)), "body": arrow.array(TEXTS).cast(kind)}, compression=compression)
    assert texts(path, text_key="body") == TEXTS


def test_each_row_group_can_be_read_by_itself(written):
    path = written({"text": TEXTS})
    source = open_source(DataConfig(path=path))
    parts = list(source.parts())
    assert [(part.start, part.stop) for part in parts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    last = list(source.read(parts[3], Tally()))
    assert last[0] == (f"{path}:901", TEXTS[900])
    assert len(last) == 100


def test_missing_and_empty_texts_are_counted(written):
    source = open_source(DataConfig(path=written({"text": ["one", None, "", "two"]})))
    assert [document.text for document in source] == ["one", "two"]
    assert (source.tally.documents, source.tally.empty) == (2, 2)


def test_bytes_that_are_not_utf8_are_counted(written):
    column = arrow.Array.from_buffers(
        arrow.string(), 2, [None, *arrow.array([b"a\xffb", b"fine"], arrow.binary()).buffers()[1:]]
    )
    path = written({"text": column})
    with pytest.raises(RequestError, match=r"1 of 2 documents are not UTF-8 \(1 sequences\)"):
        texts(path)
    assert texts(path, invalid_utf8="replace") == ["a\ufffdb", "fine"]
    assert texts(path, invalid_utf8="skip") == ["fine"]


def test_files_of_every_kind_mix(written, tmp_path):
    written({"text": ["from parquet"]}, name="b.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "from jsonl"}\n')
    (tmp_path / "c.csv").write_text("text\nfrom csv\n")
    assert texts(str(tmp_path)) == ["from jsonl", "from parquet", "from csv"]
    assert texts(str(tmp_path / "*.parquet")) == ["from parquet"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["x"]}, r"no column 'text'; its columns are: id, body \(set data.text_key to one\)"),
        ({"text": [1, 2]}, "column 'text' must be text, not int64"),
        ({"text": [["a"], ["b"]]}, "column 'text' must be text, not list"),
        ({"text": [b"x"]}, "column 'text' must be text, not binary"),
        ({"text": arrow.array([], arrow.string())}, "no text in it"),
        ({"text": ["", None]}, "no text in it"),
    ],
)
def test_a_file_without_such_texts_is_refused(written, columns, message):
    path = written(columns)
    with pytest.raises(RequestError, match=message) as caught:
        texts(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "other", "page"])
def test_a_damaged_file_is_refused(written, tmp_path, damage):
    path = written({"text": TEXTS}, compression="zstd")
    data = (tmp_path / "a.parquet").read_bytes()
    changed = {
        "cut": data[:-1],
        "half": data[: len(data) // 2],
        "empty": b"",
        "other": b"some text",
        "page": data[:4] + b"\xff" * 2000 + data[2004:],
    }
    (tmp_path / "a.parquet").write_bytes(changed[damage])
    with pytest.raises(RequestError, match=r"a\.parquet: not a whole parquet file \("):
        texts(path)


def test_without_pyarrow_the_hint_says_what_to_install(written, monkeypatch):
    path = written({"text": TEXTS})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"needs pyarrow; install it with: pip install 'polygpt\[parquet\]'"):
        texts(path)


def test_a_compressed_parquet_file_is_no_known_kind(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(RequestError, match="unknown kind of file"):
        open_source(DataConfig(path=str(tmp_path / "a.parquet.gz")))
