"""`dynamoe train`."""

import contextlib
import dataclasses
import hashlib
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from ..experiment import Experiment
from ..places import Place, absolute
from ..processes import Meeting
from ..report import report_run
from ..router_tables import Measured
from ..run_directory import environment
from ..serialization import to_json
from ..training.restore import as_trained
from ..training.routers import NoRouters, measure_routers
from ..training.train import Result, train
from .place_option import PlaceOption
from .upcycling_option import Name, NoTechnique, technique_of


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a language model, or continue a run that was stopped.

    Without arguments: a small mixture of experts on the Python standard library's text, about 3 minutes on 2 cores.
    With a recipe: a Python file of yours that defines recipe() -> Experiment; its classes may be your own.
    The options below the recipe's name change single values of what the recipe builds.
    Ctrl-C or SIGTERM saves; the same command continues.
    With --distributed: one of several processes that train one model together, see docs/pods.md.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """A recipe file (.py). None: the standard library's."""
    run_dir: PlaceOption | None = None
    """The run's directory. None: runs/ and the recipe's name."""
    init_from: PlaceOption | None = None
    """Another run's directory, whose best parameters are the first of this one; or a published model, a folder or a
    file of llama2.c. Without a recipe the published model and its tokenizer are what is trained; a recipe takes them
    from `published_model`."""
    upcycle: Name | None = None
    """Make the recipe's mixtures of experts out of the dense model of --init-from, by this technique; --upcycle
    TECHNIQUE --help shows its options. None: the two models must be the same."""
    technique: Annotated[object, tyro.conf.arg(name="upcycle")] = NoTechnique()
    seeds: tuple[int, ...] = ()
    """Train once per seed, each in a directory of its own, and print the spread. None: the one of --seed."""
    profile: bool = False
    """Write a JAX trace of a few steps into profile/ in the run's directory."""
    distributed: bool = False
    """Join the job that the environment tells of: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM,
    Cloud TPU, Open MPI or Kubernetes. Give the same command to every process."""
    job: Meeting = Meeting()
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]

    def run(self, console: Console) -> int:
        with contextlib.ExitStack() as stack:
            if self.distributed:
                job = stack.enter_context(self.job.join())
                job.check_alike(self._facts())
                console = job.console(console)
                console.print(f"process 0 of {job.count}; {jax.local_device_count()} of {jax.device_count()} devices")
            return self._run(console)

    def _facts(self) -> dict[str, Any]:
        """What has to be the same in all processes of a job."""
        here = environment()
        versions = here["versions"] | {"python": ".".join(here["versions"]["python"].split(".")[:2])}
        recipe = "" if self.recipe is None else hashlib.sha256(self.recipe.read_bytes()).hexdigest()
        paths = {"run_dir": self.run_dir, "init_from": self.init_from}
        return {
            "experiment": to_json(self.experiment),
            "recipe's SHA-256": recipe,
            "options": {name: path and str(absolute(path)) for name, path in paths.items()}
            | {"upcycle": str(technique_of(self.upcycle, self.technique)), "seeds": list(self.seeds)}
            | {"profile": self.profile},
            "versions": versions,
            "platform": here["platform"],
            "local devices": jax.local_device_count(),
            "text": self.experiment.source.describe(),
        }

    def _run(self, console: Console) -> int:
        name = "standard_library" if self.recipe is None else self.recipe.stem
        path = self.run_dir or Path("runs") / name
        if not self.seeds:
            return self._train(self.experiment, path, console).exit_status
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; each may stand there once")
        results = []
        for seed in self.seeds:
            experiment = dataclasses.replace(self.experiment, seed=seed)
            results.append(self._train(experiment, path.with_name(f"{path.name}-seed{seed}"), console))
            if results[-1].interrupted:
                return results[-1].exit_status
        values = [result.bits_per_byte for result in results]
        for seed, value in zip(self.seeds, values, strict=True):
            console.print(f"seed {seed}: {value:.4f} bits per byte", highlight=False)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        console.print(f"mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}", highlight=False)
        return 0

    def _train(self, experiment: Experiment, path: Place, console: Console) -> Result:
        result = train(
            experiment,
            path,
            recipe=self.recipe,
            init_from=self.init_from,
            upcycle=technique_of(self.upcycle, self.technique),
            profile=self.profile,
            console=console,
        )
        if not result.interrupted and jax.process_index() == 0:
            report = report_run(result.path, experiment=experiment, measured=_measured(experiment, result, console))
            console.print(f"report: {report}", markup=False, highlight=False)
        return result


def _measured(experiment: Experiment, result: Result, console: Console) -> Measured | None:
    """The routers on the text of the evaluations. None where there are none, and where several processes hold the
    model: the report then shows the last logged batch, and `dynamoe inspect` measures the rest."""
    if jax.process_count() > 1:
        return None
    trained = as_trained(experiment, result.trainer, result.state.params, result.state.variables, result.step)
    try:
        statistics = measure_routers(trained, result.held_out)
    except NoRouters:
        return None
    except (ValueError, RuntimeError) as error:  # the training itself is done and saved
        console.print(f"the report shows routers of the last logged batch: {error}", markup=False, highlight=False)
        return None
    return f"{result.held_out.bytes:,} bytes of held-out text, after step {result.step:,}", statistics
