"""The command line, `dynamoe COMMAND --help`: tyro over the dataclasses in `commands/` and the recipe's own."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from .errors import FORESEEN, TRACEBACK, status_of, tell

OF_RECIPES = ("train", "plan")
"""Commands that take a recipe, whose values are their options."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process: 0 done, 1 an error that is told in one line, 2 wrong usage, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["plan"]:
        # Before JAX is imported: beside a compiler for a chip it would look for the chip itself, and take it.
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        status = _run(arguments)
    except KeyboardInterrupt as error:
        status = status_of(error)
    except FORESEEN as error:
        if os.environ.get(TRACEBACK):
            raise
        tell(error)
        status = status_of(error)
    sys.exit(status)


def parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for. Leaves the process with status 2 where they are no command's.

    Raises:
        ValueError: the recipe cannot be used.
    """
    recipe = _recipe(arguments)
    command: Any = tyro.cli(
        _commands(recipe, arguments),
        prog="dynamoe",
        description="Mixture-of-experts and dynamic inference in JAX.",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if getattr(command, "recipe", None) != recipe:
        raise ValueError(f"recipe is {command.recipe}; it must stand right after `{arguments[0]}`, before the options")
    return command


def _run(arguments: list[str]) -> int:
    command = parse(arguments)
    if not os.environ.get(TRACEBACK):  # Orbax logs, with tracebacks, what it also raises
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _show_unraisable
    if arguments[0] != "plan":  # what is compiled for a chip that is not here can be stored, but not loaded again
        _keep_compiled_functions()
    return command.run(Console(soft_wrap=True))  # a line stays one line in a file


def _show_unraisable(unraisable: Any) -> None:
    """As Python does, but for TensorStore's threads, which find the event loop of a failed save closed and say so."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _recipe(arguments: list[str]) -> Path | None:
    """The recipe file that the arguments name; it has to be known before they are parsed."""
    named = arguments[1:] and arguments[0] in OF_RECIPES and not arguments[1].startswith("-")
    return Path(arguments[1]) if named else None


def _commands(recipe: Path | None, arguments: list[str]) -> Any:
    """The commands as types for tyro; the defaults of `train` and `plan` are what the recipe builds, and the technique
    named."""
    from .classification import ClassificationExperiment
    from .commands.bench import Bench
    from .commands.compress import Compress
    from .commands.demo import Demo
    from .commands.evaluate import Evaluate
    from .commands.export import Export
    from .commands.generate import Generate
    from .commands.init_option import default_experiment
    from .commands.inspect import Inspect
    from .commands.plan import Plan
    from .commands.reproduce import Reproduce
    from .commands.train import Train
    from .commands.train_classifier import TrainClassifier
    from .commands.upcycling_option import chosen_technique
    from .experiment import Experiment
    from .serialization import call_recipe

    experiment = default_experiment(arguments) if recipe is None else call_recipe(recipe)
    trains: Any = Train
    if isinstance(experiment, ClassificationExperiment) and arguments[0] == "train":
        trains, default = TrainClassifier, TrainClassifier(experiment=experiment)
        experiment = default_experiment([])  # of the commands that take no classifier
    elif isinstance(experiment, Experiment):
        default = Train(experiment=experiment, technique=chosen_technique(arguments))
    else:
        kinds = "an Experiment or a ClassificationExperiment" if arguments[0] == "train" else "an Experiment"
        raise ValueError(f"recipe {recipe}: recipe() returned {experiment!r}; it must return {kinds}")
    plan = Plan(experiment=experiment, base=experiment)
    train: Any = Annotated[trains, tyro.conf.subcommand("train", default=default)]
    return (
        train
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Compress, tyro.conf.subcommand("compress")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Plan, tyro.conf.subcommand("plan", default=plan)]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    )


def _keep_compiled_functions() -> None:
    """Compile once per machine: JAX's persistent cache, unless the user has placed it elsewhere."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "dynamoe" / "xla"))
