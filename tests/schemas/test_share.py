"""Shares of a stage's shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BadInput
from schemas.share import Share


@given(st.integers(1, 40), st.integers(0, 500))
def test_every_shard_is_in_one_share(of: int, shard: int) -> None:
    assert sum(share.has(shard) for share in Share.all(of)) == 1


def test_read_as_it_is_written() -> None:
    assert [Share.parse(str(share)) for share in Share.all(3)] == list(Share.all(3))


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1/0", "2", "1/2/3", "-1/2", "01/2", " 1/2", "1/2\n", "a/b"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="expected NUMBER/SHARES"):
        Share.parse(text)
