"""How Orbax stores a checkpoint: its two items, which checkpoints stay, and where older versions kept the position."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from ..places import Place, is_remote
from . import fingerprint

STATE, MANIFEST = "state", "manifest"


@dataclasses.dataclass(kw_only=True)
class Keep(PreservationPolicy):
    """Which checkpoints stay: the newest and the best."""

    keep_last: int
    keep_best: int
    metric: str
    metrics: dict[int, dict[str, float]]

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """The steps that have the metric, best first, the earlier of equals first."""
        values = {step: self.metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
        return sorted((step for step in steps if not math.isnan(values[step])), key=lambda step: (values[step], step))

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        keep = {*steps[-self.keep_last :], *self.ranked(steps)[: self.keep_best]}
        return [checkpoint.step in keep for checkpoint in checkpoints]


def position_of_old(checkpoint: Any, checksums: Sequence[int]) -> str | None:
    """The position in the data of a checkpoint that keeps it in files of Grain, one for each process.

    Args:
      checkpoint: its directory.
      checksums: of each process's position; all processes stood at the same place, so the first serves all.

    Returns:
      The position as JSON, or None where the file is missing or damaged.
    """
    try:
        text = (checkpoint / "data" / f"process_0-of-{len(checksums)}.json").read_text()
    except (OSError, ValueError):
        return None
    return text if fingerprint.text_checksum(text) == checksums[0] else None


def has_checkpoint(directory: Place) -> bool:
    """Whether a complete checkpoint lies in a directory of checkpoints. Orbax renames it when it is complete; where
    nothing can be renamed, it puts a file into it."""
    if is_remote(directory):
        return any(directory.glob("[0-9]*/commit_success.txt"))
    return any(step.name.isdigit() for step in directory.glob("[0-9]*"))


def open_manager(directory: str, keep: Keep, read_only: bool, clean: bool) -> ocp.CheckpointManager:
    """Opens a directory for checkpoints of the items STATE and MANIFEST.

    Args:
      directory: an absolute path, or an address such as gs://...
      keep: which checkpoints stay.
      read_only: change nothing there.
      clean: let Orbax remove, in the background, what an interrupted save left.
    """
    # Replica-parallel writing slices each array through a compiled function: seconds in the first save, on CPU.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    manifest = ocp.JsonCheckpointHandler()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(STATE, ocp.args.PyTreeSave, state)
    handlers.add(STATE, ocp.args.PyTreeRestore, state)
    handlers.add(MANIFEST, ocp.args.JsonSave, manifest)
    handlers.add(MANIFEST, ocp.args.JsonRestore, manifest)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=clean and not read_only,
    )
    return ocp.CheckpointManager(directory, options=options, handler_registry=handlers)
