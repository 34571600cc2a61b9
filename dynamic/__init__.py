"""Dynamic inference: algorithms over the `Layered` and `Decoder` protocols, never over a concrete model."""
