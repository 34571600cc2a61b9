"""Checkpoints of a training run, around Orbax: saved in the background, restored to the same bits or refused.

A checkpoint is the state (every array by its name) and a manifest: what the state must hold (names, shapes, dtypes,
checksums: `fingerprint.py`), the position in the data, and the metrics. The position counts global batches, so it is
the same in all processes and fits another number of them.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from ..places import Place
from . import fingerprint
from .storage import MANIFEST, STATE, Keep, open_manager, position_of_old


class DamagedCheckpoint(RuntimeError):
    """A checkpoint's files are incomplete or changed."""


class FailedSave(RuntimeError):
    """A checkpoint could not be written: the disk is full, or the directory cannot be written."""


class Checkpoints:
    """The checkpoints of one run.

    At most one save is under way; its failure is raised by the next call of `save`, `restore`, `wait` or `close`. All
    processes of a run make the same calls.
    """

    def __init__(
        self,
        directory: Place | str,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        metric: str = "held_out_bits_per_byte",
        read_only: bool = False,
    ):
        """Opens a directory of checkpoints, makes it if need be, and removes what an interrupted save left there.

        Args:
          directory: where they lie; `gs://…` is allowed.
          keep_last: how many of the newest to keep, at least 1.
          keep_best: how many with the lowest `metric` to keep besides. A checkpoint without it is never the best.
          metric: the name of a measurement.
          read_only: change nothing in the directory. So it can be read while a training run writes it.
        """
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is {keep_last}, keep_best {keep_best}; allowed are at least 1 and at least 0")
        self.directory = str(directory) if "://" in str(directory) else os.path.abspath(directory)
        if read_only and not self._is_remote() and not os.path.isdir(self.directory):
            raise ValueError(f"{self.directory}: no such directory; there is no checkpoint to read")
        self._read_only = read_only
        self._keep = Keep(keep_last=keep_last, keep_best=keep_best, metric=metric, metrics={})
        self._saving: tuple[int, int] | None = None  # step and bytes of the save under way
        self._open()

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: grain.DatasetIterator | None = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Starts to save, and returns once the arrays may be changed or donated.

        Args:
          step: the optimizer steps done so far; larger than any saved.
          state: a tree of `jax.Array`s, sharded or not, PRNG keys and Flax variables included.
          data_iterator: the position in the data, the same in every process.
          metrics: measurements of this state.

        Raises:
          ValueError: the step or the state cannot be saved, or processes stand at different positions.
          FailedSave: this or the previous save found no room, or could not write.
        """
        self.wait()
        if self._read_only:
            raise ValueError(f"{self.directory} was opened with read_only=True; save needs read_only=False")
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step is {step}; {self.directory} already has step {latest}, it must be larger")
        leaves = fingerprint.named_leaves(state)
        arrays = {name: fingerprint.as_data(leaf) for name, leaf in leaves.items()}
        if abstract := [name for name, leaf in arrays.items() if not isinstance(leaf, jax.Array)]:
            raise ValueError(f"state.{abstract[0]} is a shape without values; save needs arrays")
        needed = sum(s.data.nbytes for leaf in arrays.values() for s in leaf.addressable_shards if s.replica_id == 0)
        if _free_bytes(self.directory) < needed:
            self._fail(step, needed, "the disk is too full")
        position = None if data_iterator is None else _common(_to_text(data_iterator.get_state()))
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        manifest = {
            "step": step,
            "arrays": fingerprint.describe(leaves),
            "keys": fingerprint.key_kinds(leaves),
            "checksums": fingerprint.checksums(arrays),
            "position": position,
            "metrics": numbers,
        }
        items: dict[str, ocp.args.CheckpointArgs] = {
            STATE: ocp.args.PyTreeSave({name: leaf for name, leaf in arrays.items() if leaf.size}),
            MANIFEST: ocp.args.JsonSave(fingerprint.seal(manifest)),
        }
        self._keep.metrics[step] = numbers
        self._saving = (step, needed)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            self._fail(step, needed, _one_line(error), error)

    def restore(
        self, abstract_state: Any, data_iterator: grain.DatasetIterator | None = None, step: int | None = None
    ) -> tuple[Any, int]:
        """Restores a state, and moves `data_iterator` to its position.

        Args:
          abstract_state: a tree like the saved one, of `jax.ShapeDtypeStruct`s (or arrays) with the shardings to
            restore to, which may differ from those saved. Without a sharding: the first device.
          data_iterator: an iterator over the same data, in any number of processes.
          step: None for the newest.

        Returns:
          The state and its step.

        Raises:
          ValueError: no such checkpoint, or `abstract_state` is of another model: every missing, extra and differing
            array is listed.
          DamagedCheckpoint: the checkpoint does not hold what was saved.
        """
        return self._restore(abstract_state, data_iterator, step, part=False)

    def restore_part(self, abstract_part: Any, step: int | None = None) -> tuple[Any, int]:
        """Restores some of the arrays and reads no others: `{"params": ...}` to evaluate, or to start from.

        Args, Returns, Raises: as `restore`; the part's names are those of the whole state.
        """
        return self._restore(abstract_part, None, step, part=True)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; the one being saved counts once `wait` has returned."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The checkpoint with the lowest metric, the earliest of equals; None if none was measured."""
        return next(iter(self._keep.ranked(self.all_steps())), None)

    def all_steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        under_way = self._saving[0] if self._saving else None
        return sorted(step for step in self._manager.all_steps() if step != under_way)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          FailedSave: it failed; the earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        step, needed = self._saving
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(step, needed, _one_line(error), error)
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way and frees the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error another process may be gone, and a save of all would wait for it: the job ends without it.
        if kind is None or jax.process_count() == 1:
            self.close()

    def _open(self) -> None:
        if not self._read_only and not self._is_remote() and jax.process_index() == 0:
            # Orbax would clean up too, but later and in the background; of a remote directory only it knows the marks.
            for leftover in Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover)
        self._manager = open_manager(self.directory, self._keep, self._read_only, clean=self._is_remote())
        self._keep.metrics.clear()
        for step in self._manager.all_steps():
            content = self._read_manifest(step)
            self._keep.metrics[step] = content["metrics"] if fingerprint.is_sealed(content) else {}

    def _is_remote(self) -> bool:
        return "://" in self.directory

    def _fail(self, step: int, needed: int, problem: str, cause: Exception | None = None) -> NoReturn:
        if self._saving is not None:
            # A new manager: the failed one no longer lists what it meant to delete, and its half checkpoint must go.
            self._saving = None
            self._open()
        raise FailedSave(
            f"could not save step {step} in {self.directory}: {problem}; {needed:,} bytes needed, "
            f"{_free_bytes(self.directory):,} free; {self._others(step)}",
        ) from cause

    def _restore(
        self, template: Any, data_iterator: grain.DatasetIterator | None, step: int | None, part: bool
    ) -> tuple[Any, int]:
        self.wait()
        step = self._existing(step)
        manifest = self._read_manifest(step)
        if not fingerprint.is_sealed(manifest):
            self._damaged(step, "its manifest cannot be read")
        wanted = fingerprint.named_leaves(template)
        fingerprint.check_same_arrays(
            manifest["arrays"], fingerprint.describe(wanted), part, f"{self.directory}/{step}"
        )
        position = None if data_iterator is None else self._position(step, manifest)

        abstract = {name: _with_sharding(fingerprint.as_data(leaf)) for name, leaf in wanted.items()}
        arrays = self._read_arrays(step, abstract)
        found = fingerprint.checksums(arrays)
        if wrong := [name for name in arrays if found[name] != manifest["checksums"][name]]:
            self._damaged(step, f"{len(wrong)} of {len(arrays)} arrays hold other values than were saved: {wrong[:5]}")
        if position is not None and data_iterator is not None:
            data_iterator.set_state(json.loads(position))
        for name, kind in manifest["keys"].items():
            if name in arrays:
                arrays[name] = jax.random.wrap_key_data(arrays[name], impl=kind)
        return fingerprint.with_leaves(template, arrays), step

    def _read_arrays(self, step: int, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        stored = {name: leaf for name, leaf in abstract.items() if math.prod(leaf.shape)}
        restore = ocp.args.PyTreeRestore(
            stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=True
        )
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{STATE: restore}))[STATE]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # too little memory says nothing about the files
        except Exception as error:
            self._damaged(step, _one_line(error), error)
        empty = {name: leaf for name, leaf in abstract.items() if name not in stored}
        found |= {name: jax.device_put(np.empty(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in empty.items()}
        return {name: found[name] for name in abstract}

    def _position(self, step: int, manifest: dict[str, Any]) -> str:
        """The position in the data, which checkpoints of older versions kept in a file."""
        if manifest.get("positions"):
            position = position_of_old(self._manager.directory / str(step), manifest["positions"])
            return position if position is not None else self._damaged(step, "its position in the data is not readable")
        if manifest.get("position") is None:
            raise ValueError(f"{self.directory}/{step} holds no position in the data; pass no data_iterator")
        return manifest["position"]

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise ValueError(f"{self.directory}: there is no checkpoint in it")
        if step is not None and step not in steps:
            raise ValueError(f"step is {step}; {self.directory} has {steps}")
        return steps[-1] if step is None else step

    def _read_manifest(self, step: int) -> Any:
        try:
            return json.loads((self._manager.directory / str(step) / MANIFEST / "metadata").read_text())
        except (OSError, ValueError):
            return None

    def _damaged(self, step: int, problem: str, cause: Exception | None = None) -> NoReturn:
        way_on = "; to continue from there, move the damaged one away"
        message = f"checkpoint {self.directory}/{step} is damaged: {problem}; {self._others(step)}"
        message += way_on if self.all_steps() != [step] else ""
        raise DamagedCheckpoint(message) from cause

    def _others(self, step: int) -> str:
        others = [other for other in self.all_steps() if other != step]
        return f"other steps to restore: {others}" if others else "there is no other step to restore"


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _to_text(position: Any) -> str:
    return position.decode() if isinstance(position, bytes) else json.dumps(position, sort_keys=True)


def _common(position: str) -> str:
    """The position, after a check that all processes stand there."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        checksums = multihost_utils.process_allgather(np.uint32(fingerprint.text_checksum(position))).tolist()
        if elsewhere := [str(process) for process, checksum in enumerate(checksums) if checksum != checksums[0]]:
            raise ValueError(
                f"data_iterator stands at {position[:200]}, and elsewhere in the processes {', '.join(elsewhere)} than "
                "in process 0; its state must count global batches, the same in every process"
            )
    return position


def _free_bytes(directory: str) -> int | float:
    return math.inf if "://" in directory else shutil.disk_usage(directory).free


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:120]} ... {text[-180:]}'}"
