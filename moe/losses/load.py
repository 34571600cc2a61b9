"""The load loss: experts should expect the same number of tokens."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext
from .importance import squared_variation
from .loss import RouterLoss
from .scope import GlobalBatch, Scope


@dataclass(frozen=True, kw_only=True)
class LoadLoss(RouterLoss):
    """Squared coefficient of variation of the experts' smooth load. Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538, eq. 10-11.

    An expert's load, the number of its tokens, has no gradient. The smooth load is its expectation over the router's
    noise: the sum over tokens of the probability that the token goes to the expert, `Routing.chance`.
    """

    coefficient: float = 0.01
    scope: Scope = GlobalBatch()
    """The tokens that the load is summed over."""

    def check(self, router: Router) -> None:
        if not router.has_chance:
            raise ValueError(
                f"LoadLoss needs each expert's probability over the router's noise, and MoE.router is {router}, which "
                "does not know it; allowed are routers that do, as TopK(noise=LearnedNoise()) without balancing and "
                "groups"
            )

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        if routing.chance is None:
            raise ValueError("LoadLoss needs routing.chance, and it is None")
        parts = self.scope.parts(routing, context)
        return parts.join(squared_variation(parts.total(routing.chance)))
