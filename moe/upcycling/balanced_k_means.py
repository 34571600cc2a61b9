"""K-means whose clusters have equal sizes. Letters: N points, E clusters of I = N / E points, D width."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def balanced_k_means(
    points: Float[Array, "N D"], clusters: int, *, iterations: int, key: jax.Array
) -> Int[Array, "E I"]:
    """Group points into clusters of equal size, each point near its cluster's mean.

    Malinen and Fränti 2014, "Balanced K-Means for Clustering", assign points by the Hungarian algorithm in O(N^3). Here
    a point chooses the nearest center that has room, and points choose in the order of what another choice would cost
    them: N steps of size E. The assignment is not the best one, and a round need not lower the sum of distances.

    Args:
        points: what is grouped.
        clusters: how many; they divide N.
        iterations: rounds of assigning points and moving centers.
        key: chooses the first centers among the points.

    Returns:
        The points of each cluster, by their indices in rising order.
    """
    size = points.shape[0] // clusters

    def assign(centers: Float[Array, "E D"]) -> Int[Array, " N"]:
        products = jnp.matmul(points, centers.T, precision="highest")
        # The squared distance without the point's own square, which is the same for all centers.
        distances = jnp.square(centers).sum(axis=1)[None] - 2 * products
        nearest = jnp.sort(distances, axis=1)[:, : min(2, clusters)]
        order = jnp.argsort(nearest[:, 0] - nearest[:, -1])  # the largest loss first

        def choose(room: Int[Array, " E"], point: Int[Array, ""]) -> tuple[Int[Array, " E"], Int[Array, ""]]:
            cluster = jnp.where(room > 0, distances[point], jnp.inf).argmin().astype(jnp.int32)
            return room.at[cluster].add(-1), cluster

        _, chosen = jax.lax.scan(choose, jnp.full(clusters, size, jnp.int32), order)
        return jnp.zeros_like(chosen).at[order].set(chosen)

    def members(centers: Float[Array, "E D"]) -> Int[Array, "E I"]:
        return jnp.argsort(assign(centers), stable=True).reshape(clusters, size)

    def move(_: Int[Array, ""], centers: Float[Array, "E D"]) -> Float[Array, "E D"]:
        return points[members(centers)].mean(axis=1)

    first = points[jax.random.permutation(key, points.shape[0])[:clusters]]
    return members(jax.lax.fori_loop(0, iterations - 1, move, first))


def unit_length(vectors: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Vectors over their lengths; zero stays zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), jnp.finfo(vectors.dtype).tiny)
