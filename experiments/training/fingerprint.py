"""What a checkpoint promises to hold: the name, shape, dtype and checksum of every array.

The storage below fills a missing or emptied chunk with zeros and says nothing. A checksum per array, computed on the
devices when it is saved and again when it is restored, tells. It is a sum over the array's bits, each word weighted by
its place, modulo 2^32: sums do not depend on how the array is sharded, so it survives a change of mesh.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Leaves = dict[str, Any]


def named_leaves(tree: Any) -> Leaves:
    """Flattens a tree of arrays, `jax.ShapeDtypeStruct`s or Flax variables to `{"params.head.kernel": array}`.

    A Flax variable counts as its value, so a state with `nnx.Param`s and the pure dictionary have the same names.

    Raises:
      ValueError: a leaf is no JAX array, or two leaves have one name.
    """
    leaves: Leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = leaf.get_value() if _is_variable(leaf) else leaf
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(f"state.{name} is a {type(value).__name__}; every leaf must be a jax.Array")
        if name in leaves or not name:
            raise ValueError(f"state: {name!r} does not name one array; it must be a tree, without '.' in its keys")
        leaves[name] = value
    return leaves


def with_leaves(tree: Any, leaves: Leaves) -> Any:
    """The tree with its leaves replaced by those of `named_leaves`, in the same order."""
    _, structure = jax.tree.flatten(tree, is_leaf=_is_variable)
    old = jax.tree.leaves(tree, is_leaf=_is_variable)
    new = [
        leaf.replace(value) if _is_variable(leaf) else value for leaf, value in zip(old, leaves.values(), strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def describe(leaves: Leaves) -> dict[str, str]:
    """Shape and dtype of every array, as text that two checkpoints can be compared by."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def check_same_arrays(saved: dict[str, str], wanted: dict[str, str], part: bool, where: str) -> None:
    """Compares what a checkpoint holds with what is wanted of it, both from `describe`.

    Raises:
      ValueError: they differ; every missing, extra and differing array is listed. With `part`, none is extra.
    """
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name} is only in the checkpoint" for name in saved if name not in wanted and not part]
    problems += [
        f"{name} is {saved[name]} in the checkpoint, {wanted[name]} wanted"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if problems:
        raise ValueError(f"abstract_state does not match checkpoint {where}: {'; '.join(problems)}")


def as_data(leaf: Any) -> Any:
    """The array that is stored for a leaf: the leaf itself, or the raw data of a PRNG key array."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def key_kinds(leaves: Leaves) -> dict[str, str]:
    """The generator of every PRNG key array, such as "threefry2x32"."""
    return {
        name: str(jax.random.key_impl(leaf))
        for name, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """Checksum of every array: 16 hexadecimal digits that depend on every bit and its place, not on the sharding."""
    # One compiled function per set of devices: a state may hold sharded arrays and one that lives on a single device.
    groups: dict[Any, list[str]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(frozenset(leaf.sharding.device_set), []).append(name)
    result = {}
    for names in groups.values():
        sums = _sums([leaves[name] for name in names])
        result |= {name: bytes(np.asarray(pair)).hex() for name, pair in zip(names, sums, strict=True)}
    return {name: result[name] for name in leaves}


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Adds a checksum of the content itself."""
    return {**content, "checksum": text_checksum(json.dumps(content, sort_keys=True))}


def is_sealed(content: Any) -> bool:
    """True if the content is what `seal` returned."""
    if not isinstance(content, dict) or "checksum" not in content:
        return False
    return seal({k: v for k, v in content.items() if k != "checksum"}) == content


def text_checksum(text: str) -> int:
    return zlib.crc32(text.encode())


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _sum(x.real) + jnp.uint32(31) * _sum(x.imag)
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    sums = []
    for seed in (0x9E3779B1, 0x85EBCA77):
        weight = place * jnp.uint32(seed)
        weight = (weight ^ (weight >> jnp.uint32(15))) * jnp.uint32(0x2C1B3C6D)
        weight = (weight ^ (weight >> jnp.uint32(12))) | jnp.uint32(1)  # odd: a change in one word always shows
        sums.append(jnp.sum(words * weight, dtype=jnp.uint32))
    return jnp.stack(sums)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; 64-bit numbers become two words in a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    unsigned = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _is_variable(leaf: Any) -> bool:
    # Optax masks parts of its state: a variable may hold an empty node instead of an array, and is then no leaf. Nor is
    # one that holds several arrays, a packed weight.
    return isinstance(leaf, nnx.Variable) and jax.tree_util.all_leaves([leaf.get_value()])
