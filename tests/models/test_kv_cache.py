"""Both kinds of cache hold and give back the same; which one a program uses depends on its platform only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models.kv_cache import Apart, Cache, LayerCache, Stacked

REPEATS, ROWS, PROMPT, SLOTS, HEADS, KEY, VALUE = 3, 2, 4, 7, 2, 5, 3
KINDS = pytest.mark.parametrize("kind", [Stacked, Apart])


def keys_and_values(seed: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (REPEATS, ROWS, tokens, HEADS)
    return tuple(jnp.asarray(rng.normal(size=(*shape, width)), jnp.float32) for width in (KEY, VALUE))


@KINDS
def test_reading_a_layer_gives_what_was_written(kind):
    """A prompt, then two tokens one after another, in a program that knows neither the layer nor the slot."""
    prompt, tokens = keys_and_values(0, PROMPT), [keys_and_values(1 + i, 1) for i in range(2)]
    place, write = kind.of(prompt, SLOTS), jax.jit(lambda place, new, slot: place.write(new, slot))
    for i, new in enumerate(tokens):
        place = write(place, new, jnp.int32(PROMPT + i))
    read = jax.jit(lambda place, repeat: LayerCache(place, repeat).read(lambda keys, values: (keys, values)))
    for repeat in range(REPEATS):
        for part, got in enumerate(read(place, jnp.int32(repeat))):
            written = np.concatenate([np.asarray(new[part][repeat]) for new in (prompt, *tokens)], axis=1)
            wanted = np.zeros((ROWS, SLOTS, HEADS, written.shape[-1]), np.float32)
            wanted[:, : PROMPT + len(tokens)] = written
            np.testing.assert_array_equal(np.asarray(got), wanted.transpose(0, 2, 1, 3))


@KINDS
def test_a_cache_writes_into_every_place_of_every_segment(kind):
    prompts = [(keys_and_values(0, PROMPT), keys_and_values(1, PROMPT)), (keys_and_values(2, PROMPT),)]
    new = [(keys_and_values(3, 1), keys_and_values(4, 1)), (keys_and_values(5, 1),)]
    places = tuple(tuple(kind.of(prompt, SLOTS) for prompt in segment) for segment in prompts)
    cache = Cache(places, jnp.zeros((ROWS, SLOTS), jnp.int32)).write(new, jnp.int32(PROMPT))
    for segment, wanted in zip(cache.segments, new, strict=True):
        for place, (keys, values) in zip(segment, wanted, strict=True):
            for repeat in range(REPEATS):
                got = place.read(jnp.int32(repeat), lambda k, v: (k[:, :, PROMPT], v[:, :, PROMPT]))
                np.testing.assert_array_equal(got[0], keys[repeat, :, 0])
                np.testing.assert_array_equal(got[1], values[repeat, :, 0])
