"The tables of pairs and triples against a slow reference that follows the equations with dictionaries."
import math
from collections import Counter

import numpy as np
import pytest
import torch

from sparsecod.ngrams import KneserNey, floors, is_trained
from sparsecod.data import Corpus


def discount(counts: Counter) -> float:
    once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
    return max(once / (once + 2 * twice) if once else 0.0, 0.05)


def smoothed(counts: Counter, context: tuple, token: int, simpler: float) -> float:
    "One level of interpolated Kneser-Ney: counts of (context, token), and what the simpler table says."
    here = {k: c for k, c in counts.items() if k[:-1] == context}
    if not here: return simpler
    d, total = discount(counts), sum(here.values())
    return max(here.get((*context, token), 0) - d, 0) / total + d * len(here) / total * simpler


def reference(windows, V: int, order: int, context: tuple, token: int) -> float:
    "p(token | context) by the equations."
    grams = {n: Counter(tuple(w[i:i + n]) for w in windows for i in range(len(w) - n + 1)) for n in (2, 3)}
    single = Counter((w,) for _, w in grams[2])
    p = smoothed(single, (), token, 1 / V)
    if order == 2: return smoothed(grams[2], context[-1:], token, p)
    pairs = Counter((u, w) for _, u, w in grams[3])
    return smoothed(grams[3], context, token, smoothed(pairs, context[-1:], token, p))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('order', [2, 3])
def test_equals_the_equations(seed, order):
    rng = np.random.default_rng(seed)
    V, read = 9, rng.geometric(0.4, (12, 10)).clip(1, 8)        # token 0 never occurs
    asked = rng.integers(0, V, (40, 3))
    found = KneserNey([torch.from_numpy(read)], V).losses(torch.from_numpy(asked), order)[:, -1]
    wanted = [-math.log(reference(read.tolist(), V, order, tuple(a[:2].tolist()), int(a[2]))) for a in asked]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_the_first_target_of_a_window_has_one_token_before_it():
    rng = np.random.default_rng(0)
    table = KneserNey([rng.integers(0, 5, (20, 6))], 5)
    w = rng.integers(0, 5, (4, 6))
    np.testing.assert_array_equal(table.losses(w, 3)[:, 0], table.losses(w, 2)[:, 0])
    assert table.losses(w, 3).shape == (4, 5)


def test_counting_in_pieces_changes_nothing():
    rng = np.random.default_rng(1)
    read, w = [rng.integers(0, 50, (8, 9)) for _ in range(6)], rng.integers(0, 50, (5, 9))
    whole, pieces = KneserNey(read, 50), KneserNey(iter(read), 50, at_once=100)
    for order in (1, 2, 3): np.testing.assert_array_equal(whole.losses(w, order), pieces.losses(w, order))


def test_floors_depend_on_what_was_read_and_on_nothing_else():
    corpus = Corpus.from_texts([f'{i} and {i * i} and {i + 7}' for i in range(200)])
    w = corpus.sample_windows('val', 6, 16)
    a, b = (floors(corpus, 10, 4, 16, seed, w) for seed in (0, 1))
    assert a == floors(corpus, 10, 4, 16, 0, w) and a != b
    assert (is_trained(a['pairs'] - 0.11, a) and not is_trained(a['pairs'] - 0.09, a)
            and not is_trained(float('nan'), a))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match='V'): KneserNey([np.array([[1, 7, 2]])], 5)
    with pytest.raises(ValueError, match='windows'): KneserNey([], 5)
    with pytest.raises(ValueError, match='order'):
        KneserNey([np.array([[1, 2]])], 5).losses(np.array([[1, 2]]), 4)
