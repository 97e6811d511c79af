"""Sources: which files are read, how they divide into documents, and what is refused."""

import gzip
import json

import pytest
import zstandard

from polygpt.config import validate
from polygpt.data import DataConfig, Tally, formats, open_source
from polygpt.errors import RequestError


def texts(path, **settings):
    return [document.text for document in open_source(DataConfig(path=path, **settings))]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def jsonl(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    text = "\r\n one \n\ntwo\r\n\x00 é \n"
    assert texts(write(tmp_path / "a.txt", text)) == [text]


@pytest.mark.parametrize("chunk", [1, 7, 13, 14, 1 << 20])
def test_a_text_file_divides_at_end_of_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = write(tmp_path / "a.txt", "one\ntwo\n<|endoftext|>\n\n<|endoftext|>three<|endoftex<|endoftext|>\r\nfour\n")
    assert texts(path) == ["one\ntwo", "three<|endoftex", "four"]


def test_tiny_stories(shared_data):
    path = shared_data / "tinystories" / "stories_1800.txt"
    found = texts(str(path))
    assert len(found) == 1800
    assert found[0].startswith("One day, a little girl named Lily found a needle")
    assert not any("endoftext" in text or text != text.strip("\n") for text in found)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_or_not_the_documents_are_the_same(tmp_path, suffix):
    def pack(text):
        data = text.encode()
        halves = data[: len(data) // 2], data[len(data) // 2 :]
        # Two members, or frames, one after the other, as `cat a.gz b.gz` makes.
        compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
        return b"".join(map(compress, halves))

    rows = [{"text": f"row {i} é", "n": float("nan")} for i in range(50)]
    write(tmp_path / f"a.jsonl{suffix}", pack(jsonl(*rows)))
    write(tmp_path / f"b.txt{suffix}", pack("whole\nfile\n" * 30_000))
    assert texts(str(tmp_path)) == [row["text"] for row in rows] + ["whole\nfile\n" * 30_000]


@pytest.mark.parametrize("rest", [b"\0" * 70_000, b"a signature", b"\x1f", b"\x1f\x8a", b"\x8b" * 8])
@pytest.mark.parametrize("frames", [1, 2])
def test_bytes_after_a_gzip_file_are_ignored_as_gzip_does(tmp_path, rest, frames):
    text = "the whole text, " * 9_000
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(text.encode()) * frames + rest)) == [text * frames]


@pytest.mark.parametrize("zeros", [1, 511, 70_000])
def test_zeros_between_gzip_members_are_padding(tmp_path, zeros):
    members = [gzip.compress(text.encode()) for text in ("one, " * 20_000, "two")]
    assert texts(write(tmp_path / "a.txt.gz", (b"\0" * zeros).join([*members, b""]))) == ["one, " * 20_000 + "two"]


# With names of their own: gzip writes the time into what it makes, and pytest-xdist's processes must name a test alike.
@pytest.mark.parametrize("rest", [b"\x1f\x8bno gzip", gzip.compress(b"another")[:-5]], ids=["not gzip", "cut short"])
def test_another_gzip_member_that_is_damaged_is_refused(tmp_path, rest):
    with pytest.raises(RequestError, match="not a whole gzip file"):
        texts(write(tmp_path / "a.txt.gz", gzip.compress(b"the whole text") + rest))


def test_a_bare_compressed_suffix_is_text(tmp_path):
    assert texts(write(tmp_path / "corpus.gz", gzip.compress(b"some text"))) == ["some text"]


def test_jsonl_takes_the_key_and_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n" + jsonl({"body": "one", "text": 1}, {"body": ""}, {"body": "two\n"}))
    documents = list(open_source(DataConfig(path=path, text_key="body")))
    assert documents == [(f"{path}:2", "one"), (f"{path}:4", "two\n")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('["a"]', "line 2: an object with the key 'text' is needed, not list"),
        ('{"content": "x", "id": 1}', "line 2: no key 'text'; its keys are: content, id"),
        ("{}", "line 2: no key 'text'; its keys are: none"),
        ('{"text": 5}', "line 2: 'text' must be text, not int"),
        ('{"text": null}', "line 2: 'text' must be text, not NoneType"),
    ],
)
def test_a_bad_line_is_refused_by_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", jsonl({"text": "fine"}) + line + "\n")
    with pytest.raises(RequestError, match=message) as caught:
        texts(path)
    assert path in str(caught.value)


def test_folders_globs_and_lists_are_in_order_and_nothing_is_read_twice(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "notes.pdf"):
        write(tmp_path / name, name)
    assert texts(str(tmp_path)) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(str(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    assert texts(str(tmp_path / "**" / "c*.txt")) == ["sub/c.txt"]
    assert texts((str(tmp_path / "b.txt"), str(tmp_path / "*.txt"))) == ["b.txt", "a.txt"]


def test_a_name_with_brackets_is_itself_before_it_is_a_glob(tmp_path):
    assert texts(write(tmp_path / "a[1].txt", "brackets")) == ["brackets"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert texts(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl({"text": "one"}).encode())) == ["one"]


BAD = b"""{"text": "fine"}
{"text": "a\xffb\xfe\xfe\xef\xbf\xbd"}
{"text": "x\\ud800y"}
{"text": "\xef\xbf\xbd"}
"""


def test_text_that_is_not_utf8_is_refused_with_its_count(tmp_path):
    path = write(tmp_path / "a.jsonl", BAD)
    with pytest.raises(RequestError, match=r"2 of 4 documents are not UTF-8 \(4 sequences\)") as caught:
        texts(path)
    assert path in str(caught.value)
    with pytest.raises(RequestError, match=r"1 of 1 documents are not UTF-8 \(1 sequences\)"):
        texts(write(tmp_path / "b.txt", b"a\xffb"))


def test_text_that_is_not_utf8_is_replaced_or_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", BAD)
    for policy, expected in [
        ("replace", ["fine", "a\ufffdb\ufffd\ufffd\ufffd", "x\ufffdy", "\ufffd"]),
        ("skip", ["fine", "\ufffd"]),
    ]:
        source = open_source(DataConfig(path=path, invalid_utf8=policy))
        for _ in range(2):  # counted anew each time
            assert [document.text for document in source] == expected
            assert (source.tally.invalid, source.tally.sequences) == (2, 4)


def test_a_source_without_text_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no text in it"):
        texts(write(tmp_path / "a.txt", ""))
    with pytest.raises(RequestError, match="no text in it"):
        texts(write(tmp_path / "a.jsonl", '\n{"text": ""}\n'))
    with pytest.raises(RequestError, match=r"no text in it \(1 documents were skipped\)"):
        texts(write(tmp_path / "b.txt", b"\xff"), invalid_utf8="skip")


def test_an_empty_file_among_others_is_left_out(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "b")
    assert texts(str(tmp_path)) == ["b"]


def test_what_cannot_be_found_is_refused_at_once(tmp_path):
    write(tmp_path / "other" / "a.pdf", "x")
    write(tmp_path / "prepared" / "manifest.json", "{}")
    for path, message in [
        ("nothing.txt", "no such file"),
        ("*.txt", "no file matches"),
        ("other", "no file in it ends in .txt"),
        ("other/a.pdf", "unknown kind of file"),
        ("prepared", "prepared shards"),
    ]:
        with pytest.raises(RequestError, match=message) as caught:
            open_source(DataConfig(path=str(tmp_path / path)))
        assert path in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_damaged_is_refused(tmp_path, name):
    text = jsonl(*({"text": f"row {i}"} for i in range(2000)))
    data = gzip.compress(text.encode()) if name.endswith("gz") else zstandard.ZstdCompressor().compress(text.encode())
    beyond = [data + b"rest"] if name.endswith("zst") else []
    for damaged in (data[:-5], data[: len(data) // 2], b"plain text", *beyond):
        with pytest.raises(RequestError, match=r"not a whole (gzip|zstd) file"):
            texts(write(tmp_path / name, damaged))


def test_the_builtin_corpus():
    source = open_source(DataConfig())
    documents = list(source)
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) > 300
    assert {"topics/if", "json/decoder.py"} <= set(names)
    assert not any(name.startswith("test/") or "/test/" in name or "site-packages" in name for name in names)
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert names == [document.name for document in source]
    assert "builtin" in source.describe()


def test_a_long_list_is_described_in_one_line(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i}.txt", "x")
    line = open_source(DataConfig(path=str(tmp_path))).describe()
    assert line.endswith("and 6 more files")
    assert "\n" not in line


@pytest.mark.parametrize(
    "data",
    [
        {"path": ""},
        {"path": []},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"stride": 0},
        {"pth": "x"},
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(data):
    with pytest.raises(RequestError, match=next(iter(data))):
        validate(DataConfig, data)


def test_a_list_of_paths_is_read_from_yaml_and_written_back():
    config = validate(DataConfig, {"path": ["a.txt", "b.txt"]})
    assert config.paths == ("a.txt", "b.txt")
    assert validate(DataConfig, config.to_dict()) == config


CSV = 'id,text\r\n1,one\n2,"two, with a comma\nand a line"\n3,\n\n4,four é\n'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_csv_takes_the_column(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = write(tmp_path / f"a.csv{suffix}", compress(b"\xef\xbb\xbf" + CSV.encode()))
    source = open_source(DataConfig(path=path))
    expected = [(f"{path}:1", "one"), (f"{path}:2", "two, with a comma\nand a line"), (f"{path}:5", "four é")]
    assert list(source) == expected
    assert (source.tally.documents, source.tally.empty) == (3, 1)
    assert texts(path, text_key="id") == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("id,body\n1,x\n", r"no column 'text'; its columns are: id, body \(set data.text_key to one\)"),
        ("id,text\n1\n", r"row 1 \(line 2\) has 1 fields, the header 2"),
        ('id,text\n1,x\n2,"open', r"line 3 is not CSV"),
        ("text,id\n", "no text in it"),
        ("", "no text in it"),
        (b"text\nok\na\xffb\n", r"1 of 2 documents are not UTF-8 \(1 sequences\)"),
    ],
)
def test_a_csv_file_that_cannot_be_right_is_refused(tmp_path, data, message):
    path = write(tmp_path / "a.csv", data)
    with pytest.raises(RequestError, match=message) as caught:
        texts(path)
    assert path in str(caught.value)


def test_a_csv_field_may_be_long(tmp_path):
    assert texts(write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")) == ["x" * 300_000]


@pytest.mark.parametrize("size", [1, 5, 13, 14, 40, 10_000])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_files_read_part_by_part_are_the_same(tmp_path, monkeypatch, size, chunk):
    """However long parts are, each document is in one of them; a part can be read without those before it."""
    monkeypatch.setattr(formats, "PART_BYTES", size)
    monkeypatch.setattr(formats, "CHUNK", chunk)
    stories = "\ufeffone\n<|endoftext|><|endoftext|>\ntwo é<|endoftex<|endoftext|>\n\nthree\n<|endoftext|>\nfour\n"
    write(tmp_path / "a.txt", stories)
    write(
        tmp_path / "b.jsonl", "\n" + jsonl(*({"text": f"line {i} é"} for i in range(9)), {"text": "last"}).rstrip("\n")
    )
    write(tmp_path / "c.txt", "no separator in it\n")
    expected = ["one", "two é<|endoftex", "three", "four", *(f"line {i} é" for i in range(9)), "last"]
    expected.append("no separator in it\n")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert [document.text for document in source] == expected
    parts = list(source.parts())
    assert len(parts) > 3 or size == 10_000
    found = {part: [document.text for document in source.read(part, Tally())] for part in reversed(parts)}
    assert [text for part in parts for text in found[part]] == expected


def test_a_line_is_named_by_the_byte_its_part_begins_at(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PART_BYTES", 20)
    path = write(tmp_path / "a.jsonl", jsonl({"text": "one"}, {"text": "two"}) + "{not json}\n")
    with pytest.raises(RequestError, match=r"a\.jsonl from byte 20 line 1: not JSON"):
        texts(path)
