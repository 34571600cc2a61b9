"""What others offer for a grouped matmul, each called as its own documentation or gradient does.

Letters: M rows, D inner width, F output width, E groups. A pass of a peer is a function of x, w, sizes and dy that JAX
compiles; only torch has a call of its own. One that cannot be had is named with its reason, never passed over.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ..measuring import Call
from .operands import Numbers, Operands, host_operands
from .shapes import Shape

TOKAMAX = ("mosaic", "triton", "xla")
"""Its names; the last is `lax.ragged_dot`."""


class Peer(NamedTuple):
    """Another's grouped matmul."""

    platforms: tuple[str, ...]
    package: str
    """That it is imported from, and whose version counts."""
    call: Callable[[str, Numbers, Operands, Shape], Call]
    """Of a pass; it may raise whatever the peer raises."""
    grouped: bool = True
    """Whether its result is to be compared; one product of all rows with one matrix is not."""


def available() -> dict[str, Peer]:
    """The peers that this platform and the installed packages have; the first is the measure."""
    return {name: peer for name, peer in PEERS.items() if not _reason(peer)}


def absent() -> dict[str, str]:
    """Why the others are not there."""
    return {name: _reason(peer) for name, peer in PEERS.items() if _reason(peer)}


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {peer.package: importlib.metadata.version(peer.package) for peer in available().values()}


def _reason(peer: Peer) -> str:
    if jax.default_backend() not in peer.platforms:
        return f"it is for {' and '.join(peer.platforms)}"
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    return ""


def _torch(which: str, numbers: Numbers, given: Operands, shape: Shape) -> Call:
    """`torch.nn.functional.grouped_mm`, as its own autograd calls it."""
    import torch  # pyright: ignore[reportMissingImports]

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise NotImplementedError("this torch was built without CUDA, or finds no GPU")
    sizes = np.asarray(given.sizes)
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, numbers.dtype)
    x, w, dy = (torch.from_numpy(array).to(device, dtype) for array in host_operands(shape, len(sizes)))
    ends = torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(device)
    product = torch.nn.functional.grouped_mm
    calls = {
        "forward": lambda: product(x, w, offs=ends),
        "dx": lambda: product(dy, w.transpose(1, 2), offs=ends),
        "dw": lambda: product(x.T, dy, offs=ends),
    }
    return Call(calls[which], lambda _: torch.cuda.synchronize() if on_gpu else None)


def _dense(which: str, numbers: Numbers, given: Operands, shape: Shape) -> Call:
    """One product of all rows with one matrix, by JAX: as many operations, no groups."""
    w = given.w[0]
    return Call(lambda: _dense_pass(given.x, w, given.dy, which))


@functools.partial(jax.jit, static_argnames="which")
def _dense_pass(x: jax.Array, w: jax.Array, dy: jax.Array, which: str) -> jax.Array:
    return {"forward": lambda: x @ w, "dx": lambda: dy @ w.T, "dw": lambda: x.T @ dy}[which]()


def _by_jax(function: Callable[..., Callable[[str], jax.Array]]) -> Callable[..., Call]:
    """A peer's call, where `function` of x, w, sizes and dy gives a function from pass to result."""

    @functools.cache
    def compiled(which: str) -> Callable[..., jax.Array]:
        return jax.jit(lambda x, w, sizes, dy: function(x, w, sizes, dy)(which))

    return lambda which, numbers, given, shape: Call(lambda: compiled(which)(*given))


def _tokamax(implementation: str, x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array):
    """`tokamax.ragged_dot`; it has gradients of its own."""
    import tokamax  # pyright: ignore[reportMissingImports]

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return tokamax.ragged_dot(x, w, sizes, implementation=implementation)

    def result(which: str) -> jax.Array:
        if which == "forward":
            return product(x, w)
        return jax.vjp(product, x, w)[1](dy)[("dx", "dw").index(which)]

    return result


def _mosaic_gpu(row_tile: int, x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array):
    """JAX's example kernels for Hopper, with tiles from the ranges that they try. They have no gradient rule."""
    package = "jax.experimental.pallas.ops.gpu"
    forward = importlib.import_module(f"{package}.ragged_dot_mgpu").ragged_dot
    transposed = importlib.import_module(f"{package}.transposed_ragged_dot_mgpu").transposed_ragged_dot

    def tiles(width: int) -> dict[str, int]:
        grid = math.gcd(4, width // 128)
        steps = {"block_k": 64, "max_concurrent_steps": 4}
        return {"block_m": row_tile, "block_n": 128, "grid_block_n": grid, **steps}

    results = {
        "forward": lambda: forward(x, w, group_sizes=sizes, **tiles(w.shape[2])),
        "dx": lambda: forward(dy, w, group_sizes=sizes, transpose_rhs=True, **tiles(w.shape[1])),
        "dw": lambda: transposed(x, dy, group_sizes=sizes, **tiles(w.shape[2])),
    }
    return lambda which: results[which]()


def megablox(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array, interpret: bool = False):
    """JAX's kernels for TPU, as `megablox.gmm` and its gradient call them, in tiles larger than its default 128.

    By itself the gradient rule returns one for an argument that is not there.
    """
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    rows = math.gcd(512, x.shape[0])

    def tiles(depth: int, columns: int) -> tuple[int, int, int]:
        return rows, min(depth, 1024), min(columns, 1024)

    inner, width = w.shape[1:]
    options = {"interpret": interpret}
    results = {
        "forward": lambda: kernels.gmm(x, w, sizes, x.dtype, tiles(inner, width), **options),
        "dx": lambda: kernels.gmm(dy, w, sizes, x.dtype, tiles(width, inner), transpose_rhs=True, **options),
        "dw": lambda: kernels.tgmm(x.swapaxes(0, 1), dy, sizes, x.dtype, tiles(inner, width), **options),
    }
    return lambda which: results[which]()


PEERS = {
    "torch": Peer(("cpu", "gpu"), "torch", _torch),
    "dense": Peer(("cpu", "gpu", "tpu"), "jax", _dense, grouped=False),
    **{f"tokamax {n}": Peer(("gpu", "tpu"), "tokamax", _by_jax(functools.partial(_tokamax, n))) for n in TOKAMAX},
    **{f"mgpu {rows}": Peer(("gpu",), "jax", _by_jax(functools.partial(_mosaic_gpu, rows))) for rows in (64, 128)},
    "megablox": Peer(("tpu",), "jax", _by_jax(megablox)),
}
"""By name, the measure first. `lax.ragged_dot` is our implementation "xla"."""
