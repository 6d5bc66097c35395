"""Several sources -> one list of samples.

What `share` means. A source without a share gives all its samples. A source with share s gives so many that
they are the fraction s of the *final* mixture: with N_0 samples in the sources without a share and shares
that add up to S < 1, the mixture has N = N_0 / (1 - S) samples and the source gives round(s N). So a share of
0.1 beside 900 samples is 100, not 90. When every source has a share they must add up to 1, and N is the
largest number that all can serve.
A source that gives only a part gives a random one, drawn with the seed, in file order. Samples are never
repeated.
"""

from __future__ import annotations

import math

import numpy as np

from safemoe_jax.data.formats import Sample
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError

_ROUNDING = 1e-6  # shares are typed as decimals


def mix(parts: list[tuple[SourceConfig, list[Sample]]], seed: int) -> list[Sample]:
    """Joins sources in their order; see the module's text for `share`. Shuffling is the pipeline's task.

    Args:
        parts: each source with its samples.
        seed: chooses the samples of sources that give only a part.

    Returns:
        The samples of one epoch.

    Raises:
        InputError: no source, a source without samples, with too few for its share or with a share of less
            than a sample; shares that do not add up; a negative seed.
    """
    _check(parts, seed)
    counts = _counts([config for config, _ in parts], [len(samples) for _, samples in parts])
    mixture: list[Sample] = []
    for number, ((config, samples), count) in enumerate(zip(parts, counts, strict=True)):
        if count > len(samples):
            raise InputError(
                f"a share of {config.share:g} needs {count} samples and the source has {len(samples)}",
                where=config.path,
                expected="a smaller share, a larger file, or `take` on the other sources",
            )
        generator = np.random.default_rng([seed, number])
        chosen = np.sort(generator.choice(len(samples), size=count, replace=False))
        mixture.extend(samples[i] for i in chosen)
    return mixture


def _check(parts: list[tuple[SourceConfig, list[Sample]]], seed: int) -> None:
    if not parts:
        raise InputError("no source of samples is given", where="data", expected="at least one source")
    for config, samples in parts:
        if not samples:
            raise InputError("the source has no samples", where=config.path, expected="at least one sample")
    if seed < 0:
        raise InputError(f"seed is {seed}", where="seed", expected="0 or more")


def _counts(configs: list[SourceConfig], sizes: list[int]) -> list[int]:
    """How many samples each source gives."""
    shares = [config.share for config in configs]
    total_share = sum(share for share in shares if share is not None)
    whole = sum(size for size, share in zip(sizes, shares, strict=True) if share is None)
    paths = ", ".join(config.path for config in configs)
    if None in shares:
        if total_share >= 1 - _ROUNDING:
            raise InputError(
                f"the shares add up to {total_share:g} and leave nothing for the sources without one",
                where=f"data: {paths}",
                expected="shares whose sum is below 1",
            )
        total = whole / (1 - total_share)
    else:
        if abs(total_share - 1) > _ROUNDING:
            raise InputError(
                f"every source has a share and they add up to {total_share:g}",
                where=f"data: {paths}",
                expected="a sum of 1, or one source without a share",
            )
        total = min(size / share for size, share in zip(sizes, shares, strict=True) if share is not None)
    counts = [
        size if share is None else _rounded(share * total) for size, share in zip(sizes, shares, strict=True)
    ]
    if 0 in counts:
        config = configs[counts.index(0)]
        # Where all have shares, the others must shrink when this one grows; in proportion, say.
        rest = whole if None in shares else total * (1 - config.share)
        others = total_share - config.share if None in shares else 0.0
        raise InputError(
            f"a share of {config.share:g} gives no sample of {total:.0f}",
            where=config.path,
            expected=f"a share of at least {_smallest_share(rest, others):g}, or the source left out",
        )
    return counts


def _rounded(samples: float) -> int:
    # The tolerance keeps 0.1 * 1000 / (1 - 0.9) from becoming 999 or 1001 by binary rounding.
    return int(samples + 0.5 + _ROUNDING)


def _smallest_share(rest: float, others: float) -> float:
    """The smallest share that gives a sample, rounded up to four digits.

    It is the s of s N = 1/2, the least that rounds to 1, in a mixture of N = rest / (1 - others - s) samples.

    Args:
        rest: samples of the sources that take what the shares leave.
        others: sum of the other shares.
    """
    share = 0.5 * (1 - others) / (rest + 0.5)
    digit = 10.0 ** (math.floor(math.log10(share)) - 3)
    return math.ceil(share / digit - _ROUNDING) * digit
