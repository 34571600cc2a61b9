"""A checksum tells every changed bit and every moved word; names are those of the tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dynamoe.experiments.training.fingerprint import checksums, is_sealed, named_leaves, seal, with_leaves

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int4", "uint8", "int32", "bool", "complex64"]


def checksum(array: Any) -> str:
    return checksums({"x": jnp.asarray(array)})["x"]


@given(word=st.integers(0, 63), bit=st.integers(0, 31), seed=st.integers(0, 2**32 - 1))
def test_one_flipped_bit_always_shows(word: int, bit: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (4, 16), dtype=np.uint32)
    flipped = words.copy()
    flipped.flat[word] ^= np.uint32(1 << bit)
    assert checksum(words) != checksum(flipped)
    assert checksum(words) == checksum(words.copy())


@given(places=st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True))
def test_two_words_that_changed_places_show(places: list[int]) -> None:
    words = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    moved = words.copy()
    moved.flat[places] = moved.flat[places[::-1]]
    assert checksum(words) != checksum(moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_element_of_every_dtype_shows(dtype: str) -> None:
    values = jnp.asarray([0, 1, 0, 1, 1, 0], dtype=dtype)
    changed = values.at[4].set(jnp.asarray(0, dtype))
    assert checksum(values) != checksum(changed)
    assert checksum(values) != checksum(jnp.zeros_like(values))


def test_signs_of_zero_and_payloads_of_nan_are_told_apart() -> None:
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert checksum(np.zeros(1, np.float32)) != checksum(-np.zeros(1, np.float32))
    assert checksum(nans[:1]) != checksum(nans[1:])


def test_no_elements_and_one_element_have_checksums() -> None:
    assert checksum(jnp.zeros((0, 3))) == "0" * 16
    assert checksum(jnp.float32(1)) != checksum(jnp.float32(2))


def test_a_sealed_text_tells_a_change() -> None:
    content = seal({"a": 0.1, "b": [1, 2]})
    assert is_sealed(content)
    assert not is_sealed({**content, "a": 0.2})
    assert not is_sealed({"a": 0.1})
    assert not is_sealed(None)


def test_leaves_are_named_by_their_path_and_put_back() -> None:
    tree = {"layers": [nnx.Param(jnp.ones(2), axes=("embed",)), (jnp.zeros(3), None)]}
    leaves = named_leaves(tree)
    assert list(leaves) == ["layers.0", "layers.1.0"]
    rebuilt = with_leaves(tree, {name: leaf + jnp.float32(1) for name, leaf in leaves.items()})
    assert rebuilt["layers"][0].axes == ("embed",)
    np.testing.assert_array_equal(rebuilt["layers"][0][...], [2, 2])
    np.testing.assert_array_equal(rebuilt["layers"][1][0], [1, 1, 1])


def test_what_optax_masks_is_no_leaf() -> None:
    params = {"kernel": nnx.Param(jnp.ones((2, 2))), "bias": nnx.Param(jnp.ones(2))}
    masked = optax.masked(optax.scale_by_adam(), {"kernel": True, "bias": False})
    with jax.numpy_dtype_promotion("standard"):
        state = masked.init(params)
    leaves = named_leaves(state)
    assert not any("bias" in name for name in leaves)
    assert jax.tree.structure(with_leaves(state, leaves)) == jax.tree.structure(state)
