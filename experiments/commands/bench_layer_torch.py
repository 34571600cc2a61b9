"""The peers of `dynamoe bench moe_layer`: torch's grouped_mm, and transformers' block that runs its experts by it.

Their tensors are JAX's arrays, without a copy where the layout is the same. JAX keeps three quarters of a GPU's memory
for itself: XLA_PYTHON_CLIENT_PREALLOCATE=false leaves torch what it does not need. Letters: D width, F hidden width, E
experts.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ...kernels.grouped_matmul.peers import absent
from ...kernels.measuring import Call
from .bench_layer_ours import Results, Timed, checked_columns
from .bench_layer_problem import Problem, Shape

PRODUCTS, BLOCK = "its products by torch's grouped_mm", "transformers' OLMoE block, grouped_mm"
"""The block is OLMoE's at any size, for it has the router of `layer_config`."""


def peer_versions() -> dict[str, str]:
    """Of transformers, where it is installed; torch's are the kernel's."""
    return {"transformers": importlib.metadata.version("transformers")} if _installed() else {}


def timed_torch_products(problem: Problem) -> Timed:
    """The grouped products of SwiGLU experts over equal groups, as its own autograd runs them."""
    torch = _torch()
    shape, (_, *weights) = problem.shape, problem.weights
    assignments = shape.tokens * shape.chosen
    gate, up, down = map(_tensor, weights)
    like = {"device": gate.device, "dtype": gate.dtype}
    ends = torch.arange(1, shape.experts + 1, dtype=torch.int32, device=gate.device) * (assignments // shape.experts)
    rows, hidden = torch.randn(assignments, shape.width, **like), torch.randn(assignments, shape.hidden, **like)
    operands = [(rows, gate, hidden), (rows, up, hidden), (hidden, down, rows)]

    def products() -> list[Any]:
        results = []
        for x, weight, dy in operands:
            x = x.detach().requires_grad_()
            y = torch.nn.functional.grouped_mm(x, weight, offs=ends)
            results.append((y.detach(), torch.autograd.grad(y, (x, weight), dy)))
        return results

    return Timed(Call(products, _wait), _temporary_bytes(products))


def timed_transformers_block(problem: Problem) -> Timed:
    """A whole layer of transformers with the same weights."""
    _torch()
    block, x, given = _block(problem), _tensor(problem.x), _tensor(problem.dy).detach()
    names = [name for name, _ in block.named_parameters()]

    def run(dy: Any) -> tuple[Any, dict[str, Any]]:
        import torch  # pyright: ignore[reportMissingImports]

        y = block(x)
        dx, *dparams = torch.autograd.grad(y, (x, *block.parameters()), dy)
        return y.detach(), {"x": dx, **dict(zip(names, dparams, strict=True))}

    def results(dy: jax.Array) -> Results:
        return _shown(problem.shape, *run(_tensor(dy).detach()))

    return Timed(Call(lambda: run(given), _wait), _temporary_bytes(lambda: run(given)), results)


def _installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _torch() -> Any:
    """The package.

    Raises:
        NotImplementedError: it is not there, or sees no GPU where JAX computes on one.
    """
    if reason := absent().get("torch"):
        raise NotImplementedError(reason)
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            raise NotImplementedError("this torch was built without CUDA, or finds no GPU")
        torch.cuda.empty_cache()  # what a model before this one left there
    return torch


def _tensor(array: jax.Array) -> Any:
    """The array's own memory, on its own device, as a leaf that gradients are asked of."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_dlpack(array).requires_grad_()


def _wait(_: Any) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _temporary_bytes(run: Callable[[], Any]) -> int | None:
    """At the peak, beyond what is there when it is done and its results are held. On CPU torch counts nothing."""
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() != "gpu":
        return None
    run()  # what stays allocated from then on is no temporary
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del held
    return int(peak)


def _block(problem: Problem) -> Any:
    if not _installed():
        raise NotImplementedError("transformers is not installed")
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import OlmoeConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.olmoe import modeling_olmoe  # pyright: ignore[reportMissingImports]

    shape = problem.shape
    config = OlmoeConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=False,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):  # the weights come from us
        block = modeling_olmoe.OlmoeSparseMoeBlock(config)
    router, gate, up, down = (_tensor(weight).detach().mT for weight in problem.weights)
    values = {
        "gate.weight": router.float().contiguous(),
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": down.contiguous(),
    }
    block.load_state_dict(values, assign=True)
    _choose_in_float32(block.gate, down.dtype)
    return block


def _choose_in_float32(router: Any, dtype: Any) -> None:
    """As ours does, and DeepSeek-V3's: by logits in bfloat16 it would choose other experts for many tokens.

    The weights go on in the dtype of the tokens, as they would without this.
    """
    router.register_forward_pre_hook(lambda _, tokens: (tokens[0].float(),))
    router.register_forward_hook(lambda _, tokens, chosen: (chosen[0], chosen[1].to(dtype), chosen[2]))


def _shown(shape: Shape, y: Any, gradients: dict[str, Any]) -> Results:
    def weight(gradient: Any) -> np.ndarray:
        """As [..., inputs, outputs], in the columns that are compared."""
        return host(gradient[..., checked_columns(gradient.shape[-2]), :].mT)

    def host(tensor: Any) -> np.ndarray:
        return tensor.float().cpu().numpy()

    both = gradients["experts.gate_up_proj"]
    return Results(
        y=host(y[0]),
        x=host(gradients["x"][0]),
        router=weight(gradients["gate.weight"]),
        gate=weight(both[:, : shape.hidden]),
        up=weight(both[:, shape.hidden :]),
        down=weight(gradients["experts.down_proj"]),
    )
