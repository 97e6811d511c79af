"""How a prompt is cut into chunks."""

import pytest

from polygpt.generation.reader import next_chunk


@pytest.mark.parametrize(
    ("sizes", "left", "chunks"),
    [
        ([64, 16], 5, [16]),
        ([64, 16], 16, [16]),
        ([64, 16], 17, [64]),  # padding is left out
        ([64, 16], 130, [64, 64, 16]),
        ([512, 128, 32, 16], 900, [512, 512]),
        ([512, 128, 32, 16], 300, [128, 128, 32, 16]),  # a chunk of 512 would be padding for the most part
        ([8], 20, [8, 8, 8]),
    ],
)
def test_as_few_chunks_as_are_not_wasted_on_padding(sizes, left, chunks):
    found = []
    while left > 0:
        found.append(next_chunk(sizes, left))
        left -= found[-1]
    assert found == chunks
