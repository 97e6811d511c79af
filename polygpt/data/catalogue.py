"""Data sets by name: where each is, which of its files are for training, and what to know before using it."""

from __future__ import annotations

from typing import NamedTuple


class Dataset(NamedTuple):
    """A published data set.

    Attributes:
        where: what `data.path` reads (`hf:...`), or the address of a file to download by hand.
        text_key: the column with the text; of plain text, empty.
        splits: the splits that it comes with; `where` holds the training files, of which a part is held out as usual.
        size: roughly.
    """

    where: str
    text_key: str
    splits: str
    size: str
    licence: str
    reference: str

    @property
    def is_read(self) -> bool:
        """Whether `data.path` can name it, rather than a file that was downloaded by hand."""
        return self.where.startswith("hf:")


_FINEWEB, _WIKITEXT = "HuggingFaceFW/fineweb-edu", "Salesforce/wikitext"
DATASETS = {
    "tinystories": Dataset(
        "hf:datasets/roneneldan/TinyStories/data/train-*.parquet",
        "text",
        "train, validation",
        "2.1 M stories, 2 GB of text",
        "CDLA-Sharing-1.0",
        "arXiv:2305.07759",
    ),
    "wikitext-2": Dataset(
        f"hf:datasets/{_WIKITEXT}/wikitext-2-raw-v1/train-*.parquet",
        "text",
        "train, validation, test",
        "2 M words, 11 MB of text",
        "CC-BY-SA-3.0",
        "arXiv:1609.07843",
    ),
    "wikitext-103": Dataset(
        f"hf:datasets/{_WIKITEXT}/wikitext-103-raw-v1/train-*.parquet",
        "text",
        "train, validation, test",
        "103 M words, 540 MB of text",
        "CC-BY-SA-3.0",
        "arXiv:1609.07843",
    ),
    "fineweb-edu-10bt": Dataset(
        f"hf:datasets/{_FINEWEB}/sample/10BT/*.parquet",
        "text",
        "train",
        "10 B tokens, 27 GB of files",
        "ODC-By-1.0",
        "arXiv:2406.17557",
    ),
    "fineweb-edu": Dataset(
        f"hf:datasets/{_FINEWEB}/data/*/*.parquet", "text", "train", "1.3 T tokens", "ODC-By-1.0", "arXiv:2406.17557"
    ),
    "openwebtext": Dataset(
        "hf:datasets/Skylion007/openwebtext/plain_text/train-*.parquet",
        "text",
        "train",
        "8 M documents, 40 GB of text",
        "CC0-1.0",
        "skylion007.github.io/OpenWebTextCorpus",
    ),
    "smollm-corpus": Dataset(
        "hf:datasets/HuggingFaceTB/smollm-corpus/cosmopedia-v2/*.parquet",
        "text",
        "train",
        "28 B tokens (the part cosmopedia-v2)",
        "ODC-By-1.0",
        "huggingface.co/blog/smollm",
    ),
    "gsm8k": Dataset(
        "hf:datasets/openai/gsm8k/main/train-*.parquet",
        "question",
        "train, test",
        "7,473 problems for training",
        "MIT",
        "arXiv:2110.14168",
    ),
    "shakespeare": Dataset(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "",
        "none",
        "1.1 MB",
        "public domain",
        "github.com/karpathy/char-rnn",
    ),
    "enwik8": Dataset(
        "https://mattmahoney.net/dc/enwik8.zip", "", "none", "100 MB", "CC-BY-SA", "mattmahoney.net/dc/textdata.html"
    ),
    "text8": Dataset(
        "https://mattmahoney.net/dc/text8.zip", "", "none", "100 MB", "CC-BY-SA", "mattmahoney.net/dc/textdata.html"
    ),
}
