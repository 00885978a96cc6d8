"""Digests as arrays: the same answers as a list of digests gives, and the same bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.digests import DigestArray, HashSet, to_hex, to_words

SHA256, BLAKE3 = DigestFunction.SHA256, DigestFunction.BLAKE3

HASHES = st.sampled_from(["00" * 32, "ff" * 32, "ab" * 31 + "00", "ab" * 31 + "01", "00" * 31 + "01"]) | (
    st.binary(min_size=32, max_size=32).map(bytes.hex)
)
SIZES = st.integers(1, 1 << 50) | st.integers(1, 300)
DIGESTS = st.lists(st.builds(Digest, HASHES, SIZES, st.just(SHA256)), max_size=40)


@given(DIGESTS)
def test_an_array_is_the_sequence_of_its_digests(digests: list[Digest]) -> None:
    array = DigestArray.of(digests, SHA256)
    assert list(array) == digests
    assert [array[row] for row in range(len(array))] == digests
    assert list(array[1:3]) == digests[1:3]
    assert all(digest in array for digest in digests)
    assert Digest("12" * 32, 0) not in array
    assert array.size_bytes == sum(digest.size_bytes for digest in digests)


@given(DIGESTS, DIGESTS)
def test_joined_arrays_have_each_digest_once_in_order(first: list[Digest], second: list[Digest]) -> None:
    arrays = [DigestArray.of(first, SHA256), DigestArray.of(second, SHA256)]
    assert list(DigestArray.joined(arrays, SHA256)) == sorted({*first, *second})


@given(DIGESTS, DIGESTS)
def test_some_are_left_out_by_their_hashes(digests: list[Digest], others: list[Digest]) -> None:
    hashes = {digest.hash for digest in others}
    left = DigestArray.of(digests, SHA256).without(HashSet.of(others))
    assert list(left) == [digest for digest in digests if digest.hash not in hashes]


@given(DIGESTS)
def test_it_is_encoded_as_protobuf_does_it(digests: list[Digest]) -> None:
    request = reapi.FindMissingBlobsRequest(
        blob_digests=[reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes) for digest in digests]
    )
    assert DigestArray.of(digests, SHA256).encoded(2) == request.SerializeToString(deterministic=True)


@given(DIGESTS, DIGESTS)
def test_a_stranger_is_found(digests: list[Digest], others: list[Digest]) -> None:
    stranger = DigestArray.of(digests, SHA256).stranger(others)
    if set(others) <= set(digests):
        assert stranger is None
    else:
        assert stranger in set(others) - set(digests)


@pytest.mark.timeout(60)  # a second; minutes, were each compared with all that begin alike
def test_very_many_hashes_that_begin_alike_are_told_apart_in_time() -> None:
    hashes = np.zeros((200_000, 32), np.uint8)
    hashes[:, 28:] = np.arange(200_000, dtype=">u4")[:, np.newaxis].view(np.uint8)
    everything = DigestArray(hashes, np.ones(200_000, np.int64), SHA256)
    half = everything.take(slice(0, None, 2))
    assert everything.stranger(half) is None
    assert half.stranger(everything) == everything[1]
    assert list(everything.without(HashSet.of(half))[:2]) == [everything[1], everything[3]]


@pytest.mark.parametrize("hash_", ["AB" * 32, "ab" * 31, "zz" * 32, " " * 64, ""])
def test_a_hash_that_is_none_is_a_stranger(hash_: str) -> None:
    array = DigestArray.of([Digest("ab" * 32, 1)], SHA256)
    stranger = Digest(hash_, 1)
    assert array.stranger([Digest("ab" * 32, 1), stranger]) == stranger


@pytest.mark.parametrize("bad", [Digest("AB" * 32, 1), Digest("a" * 63, 1), Digest("ab" * 32, -1)])
def test_a_malformed_digest_is_refused(bad: Digest) -> None:
    with pytest.raises(InvalidArgument):
        DigestArray.of([Digest("ab" * 32, 1), bad], SHA256)


def test_functions_are_told_apart() -> None:
    array = DigestArray(np.zeros((1, 32), np.uint8), np.ones(1, np.int64), BLAKE3)
    assert Digest("00" * 32, 1, BLAKE3) in array
    assert Digest("00" * 32, 1, SHA256) not in array


MANY_HASHES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(5000)]
# Few distinct words, so that many hashes begin alike.
ALIKE = st.tuples(*[st.sampled_from(["00" * 8, "ab" * 8, "ff" * 8])] * 4).map("".join)


def test_hashes_become_words_and_back() -> None:
    words = to_words(MANY_HASHES)
    assert [to_hex(row) for row in words] == MANY_HASHES
    assert [int(first) for first in words[:, 0]] == [int(hash_[:16], 16) for hash_ in MANY_HASHES]
    assert to_words([]).shape == (0, 4)


@pytest.mark.parametrize("bad", ["a" * 63, "a" * 65, "A" * 64, "g" * 64, " " * 64, "é" * 64, "a" * 62 + " a"])
def test_a_malformed_hash_among_many_is_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        to_words([*MANY_HASHES[:10], bad])


def test_lengths_that_make_up_for_each_other_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        to_words(["a" * 63, "b" * 65])


@pytest.mark.parametrize("place", [0, 4095, 4096, 4999])
def test_a_malformed_hash_is_refused_in_every_piece(place: int) -> None:
    hashes = list(MANY_HASHES)
    hashes[place] = hashes[place].upper()
    with pytest.raises(InvalidArgument):
        to_words(hashes)


@given(st.lists(ALIKE, max_size=30), st.lists(ALIKE, max_size=30))
def test_a_set_answers_like_a_set_also_for_hashes_that_begin_alike(
    members: list[str], asked: list[str]
) -> None:
    found = HashSet(to_words(members)).contains(to_words(asked))
    assert found.tolist() == [hash_ in members for hash_ in asked]
