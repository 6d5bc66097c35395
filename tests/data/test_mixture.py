"""Shares of a mixture, checked by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from safemoe_jax.data.formats import Sample
from safemoe_jax.data.mixture import mix
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError

Part = tuple[SourceConfig, list[Sample]]


def part(name: str, size: int, share: float | None = None) -> Part:
    samples = [Sample(user=f"{name}{i}", answer="a", source=name, index=i) for i in range(size)]
    return SourceConfig(name, share=share), samples


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ([part("a", 10), part("b", 5)], {"a": 10, "b": 5}),
        ([part("a", 900), part("b", 500, 0.1)], {"a": 900, "b": 100}),
        ([part("a", 1000), part("b", 2483, 0.1)], {"a": 1000, "b": 111}),
        ([part("a", 50), part("b", 200, 0.3), part("c", 200, 0.2)], {"a": 50, "b": 30, "c": 20}),
        ([part("a", 100, 0.5), part("b", 30, 0.3), part("c", 500, 0.2)], {"a": 50, "b": 30, "c": 20}),
        ([part("a", 7, 1.0)], {"a": 7}),
    ],
)
def test_counts_and_no_repetition(parts: list[Part], counts: dict[str, int]) -> None:
    mixture = mix(parts, seed=0)
    assert Counter(sample.source for sample in mixture) == counts
    assert len({sample.user for sample in mixture}) == len(mixture)


def test_shares_hold_to_one_sample_for_any_sizes() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        whole, share = int(generator.integers(50, 400)), float(generator.uniform(0.01, 0.6))
        mixture = mix([part("a", whole), part("b", 1000, share)], seed=0)
        assert abs(sum(s.source == "b" for s in mixture) - share * len(mixture)) <= 1


def test_a_partial_source_is_drawn_by_the_seed_from_all_of_it() -> None:
    parts = [part("a", 90), part("b", 1000, 0.1)]

    def drawn(seed: int) -> list[int]:
        return [s.index for s in mix(parts, seed) if s.source == "b"]

    assert drawn(1) == drawn(1) == sorted(drawn(1))
    assert drawn(1) != drawn(2)
    assert max(i for seed in range(20) for i in drawn(seed)) > 900


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([part("a", 100), part("b", 500, 0.9)], "needs 900 samples and the source has 500"),
        ([part("a", 10), part("b", 5, 0.6), part("c", 5, 0.4)], "leave nothing"),
        ([part("a", 10, 0.5), part("b", 5, 0.4)], "they add up to 0.9"),
        ([], "no source of samples is given"),
        ([part("a", 10), part("b", 0, 0.1)], "the source has no samples"),
    ],
)
def test_shares_that_cannot_be(parts: list[Part], what: str) -> None:
    with pytest.raises(InputError, match=what):
        mix(parts, seed=0)


@pytest.mark.parametrize(
    ("others", "share"),
    [
        ([part("a", 12)], 0.01),
        ([part("a", 7), part("b", 50, 0.3)], 0.02),
        ([part("a", 123_456)], 1e-6),
        ([part("a", 30, 0.99)], 0.01),
        ([part("a", 10, 0.5), part("b", 20, 0.49)], 0.01),
    ],
)
def test_a_share_that_gives_nothing_names_the_smallest_that_gives_a_sample(
    others: list[Part], share: float
) -> None:
    """Just that share gives one sample, and a little less none; where all shares add up to 1 the others
    shrink in proportion."""
    with pytest.raises(InputError, match=f"a share of {share:g} gives no sample") as caught:
        mix([*others, part("small", 1000, share)], seed=0)
    assert caught.value.where == "small"
    smallest = float(caught.value.expected.split()[5].rstrip(","))

    def given(share_now: float) -> int:
        whole = any(config.share is None for config, _ in others)
        shrink = 1.0 if whole else (1 - share_now) / (1 - share)
        parts = [
            (SourceConfig(c.path, share=None if c.share is None else c.share * shrink), s) for c, s in others
        ]
        mixture = mix([*parts, part("small", 1000, share_now)], seed=0)
        return sum(sample.source == "small" for sample in mixture)

    assert given(smallest) == 1
    with pytest.raises(InputError, match="gives no sample"):
        given(smallest * 0.99)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed is -1") as caught:
        mix([part("a", 3)], seed=-1)
    assert caught.value.expected == "0 or more"
