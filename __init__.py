"""dynamoe: conditional computation for JAX.

Mixture-of-experts, dynamic inference and compressed experts, as modules that a researcher imports
(`dynamoe.moe`, `dynamoe.models`, ...) and as experiments that run from a laptop CPU to a TPU pod.
"""

__version__ = "0.1.0"
