"""Keyed random numbers.

Covers: Philox4x32-10 against the Random123 known answers and against plain Python integers; how key and
counter are formed from seed, row, epoch, stream and block; independence of batch order and split; range and
spread of `uniform`; `permutation` is one, differs by epoch and seed, and is unbiased.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _philox

from extrema_fast import rng

M32 = 0xFFFFFFFF

# kat_vectors of Random123 1.14: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32, M32, M32, M32), (M32, M32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The algorithm on Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M32, (a >> 32) ^ c3 ^ k1, a & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter, key, wanted):
    out = rng.philox(*(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(w) for w in out) == wanted
    assert plain_philox(counter, key) == wanted


def test_philox_equals_plain_integers_at_random_counters():
    counters = torch.randint(0, 1 << 32, (64, 4))
    for seed in (0, 1, (1 << 63) - 1, 0xDEADBEEF12345678):
        out = torch.stack(rng.philox(*counters.unbind(1), seed), 1)
        for row, got in zip(counters.tolist(), out.tolist(), strict=True):
            assert tuple(got) == plain_philox(tuple(row), (seed & M32, seed >> 32))


def test_words_form_the_counter_as_documented():
    rows = [0, 1, 12345, (1 << 32) + 7, (1 << 40) - 1]
    seed, epoch, stream = (3 << 32) | 5, 11, rng.MASK
    got = rng.words(torch.tensor(rows), 10, seed=seed, epoch=epoch, stream=stream)
    assert got.shape == (5, 10) and got.dtype == torch.int64
    for row, words in zip(rows, got.tolist(), strict=True):
        wanted = []
        for block in range(3):
            counter = (row & M32, row >> 32, epoch, stream << 16 | block)
            wanted += plain_philox(counter, (5, 3))
        assert words == wanted[:10]


def test_streams_have_their_documented_numbers():
    # part of every counter: a new number changes every run
    first = [rng.ORDER, rng.CROP, rng.COLOR_STUDENT, rng.COLOR_TEACHER, rng.MASK, rng.DROP_PATH]
    assert [*first, rng.INIT, rng.PASS, rng.SHARD, rng.SUBSTITUTE] == list(range(10))


def test_a_row_has_the_same_words_in_any_batch():
    index = torch.randperm(100)
    keys = {"seed": 9, "epoch": 2, "stream": rng.CROP}
    together = rng.words(index, 7, **keys)
    assert torch.equal(together[together.shape[0] // 2 :], rng.words(index[50:], 7, **keys))
    assert torch.equal(together[index.argsort()], rng.words(torch.arange(100), 7, **keys))
    # asking for more words leaves the first ones alone
    assert torch.equal(rng.words(index, 23, **keys)[:, :7], together)
    assert torch.equal(rng.words(index.int(), 7, **keys), together)


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 1 << 40}, {"epoch": 1}, {"stream": rng.MASK}])
def test_each_key_changes_the_words(change):
    keys = {"seed": 1, "epoch": 0, "stream": rng.CROP}
    a = rng.words(torch.arange(50), 4, **keys)
    b = rng.words(torch.arange(50), 4, **(keys | change))
    assert (a == b).float().mean() < 0.02


def test_too_many_words_for_one_stream():
    # the next block would spill into the next stream
    with pytest.raises(ValueError, match="262144"):
        rng.words(torch.arange(1), (4 << 16) + 1, seed=0, epoch=0, stream=0)


def test_uniform_is_the_upper_24_bits():
    keys = {"seed": 4, "epoch": 0, "stream": 1}
    w, u = rng.words(torch.arange(1000), 8, **keys), rng.uniform(torch.arange(1000), 8, **keys)
    assert u.dtype == torch.float32
    assert torch.equal(u.double() * 2**24, (w >> 8).double())
    assert u.min() >= 0 and u.max() < 1
    # 8000 draws in 20 bins: chi-square with 19 degrees of freedom, 0.1 % and 99.9 % points
    counts = torch.histc(u, 20, 0, 1)
    assert 5.4 < float((counts - 400).square().sum() / 400) < 43.8
    assert abs(torch.corrcoef(u.T).fill_diagonal_(0)).max() < 0.12


def test_uniform_never_reaches_one(monkeypatch):
    monkeypatch.setattr(_philox, "words", lambda *a, **k: torch.tensor([[M32, 0, 255, 256]]))
    assert rng.uniform(torch.arange(1), 4, seed=0, epoch=0, stream=0).tolist() == [[1 - 2**-24, 0, 0, 2**-24]]


@pytest.mark.parametrize("n", [1, 2, 19, 1000, 30000])
def test_permutation_holds_every_row_once(n):
    p = rng.permutation(n, seed=5, epoch=3)
    assert p.dtype == torch.int64
    assert torch.equal(p.sort().values, torch.arange(n))


def test_permutations_differ_by_epoch_and_seed_only():
    p = rng.permutation(500, seed=1, epoch=0)
    assert torch.equal(p, rng.permutation(500, seed=1, epoch=0))
    for seed, epoch in ((1, 1), (2, 0), (1 + (1 << 32), 0)):
        other = rng.permutation(500, seed=seed, epoch=epoch)
        assert (p == other).sum() < 10
        # nor the same order turned round
        assert (p == other.flip(0)).sum() < 10


def test_permutations_are_unbiased():
    # each of 24 orders of 4 rows over 720 epochs: chi-square, 23 degrees of freedom
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(720):
        p = tuple(rng.permutation(4, seed=7, epoch=epoch).tolist())
        counts[p] = counts.get(p, 0) + 1
    assert len(counts) == 24
    assert sum((c - 30) ** 2 for c in counts.values()) / 30 < 49.7
