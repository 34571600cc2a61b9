"""Who competes with whom is a matter of the routing group, not of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dynamoe.moe import BatchPriority, CapacityDispatcher, DenseDispatcher, ExpertChoice, MoE, RoutingContext, TopK
from dynamoe.moe.routing_groups import in_groups, real_in_groups


def test_the_last_group_is_filled_up():
    values = jnp.arange(7) + 1
    np.testing.assert_array_equal(in_groups(values, 3), [[1, 2, 3], [4, 5, 6], [7, 0, 0]])
    np.testing.assert_array_equal(in_groups(values, None), [[1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(in_groups(values, 9), [[1, 2, 3, 4, 5, 6, 7]])
    real = real_in_groups(RoutingContext(mask=values != 2), 7, 3)
    np.testing.assert_array_equal(real, [[True, False, True], [True, True, True], [True, False, False]])


def equal_on_one_device_and_on_eight():
    # 8 sequences of 4 tokens, one to a device, and groups of 6 tokens, which devices share.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, mask = jax.random.normal(jax.random.key(0), (8, 4, 8)), jnp.arange(32) % 5 != 1
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    crowded = CapacityDispatcher(capacity_factor=0.5, routing_group=6, order=BatchPriority())
    for router, dispatcher in [
        (ExpertChoice(capacity_factor=1.0, routing_group=6), DenseDispatcher()),
        (TopK(k=2), crowded),
    ]:
        config = MoE(experts=4, router=router, dispatcher=dispatcher, losses=())
        graph, state = nnx.split(config.build(width=8, key=jax.random.key(1)))
        run = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x, RoutingContext(mask=mask)))
        (y, stats), (on_eight, stats_on_eight) = run(state, x), run(state, split)
        assert len(on_eight.sharding.device_set) == 8 and (stats.dropped > 0.1) == (dispatcher is crowded)
        assert 0 < (np.abs(y).max(axis=2) == 0).sum() < 32
        np.testing.assert_allclose(on_eight, y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats_on_eight.dropped, stats.dropped, rtol=1e-6)
        np.testing.assert_allclose(stats_on_eight.load, stats.load, rtol=1e-6)


def test_results_do_not_depend_on_the_mesh(run_with_devices):
    run_with_devices(8, equal_on_one_device_and_on_eight)
