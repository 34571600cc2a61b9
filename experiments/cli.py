"""The command line, `dynamoe COMMAND --help`: tyro over the dataclasses in `commands/` and the recipe's own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import tyro
from rich.console import Console

TRACEBACK = "DYNAMOE_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process: 0 done, 1 an error that is told in one line, 2 wrong usage, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(arguments)
    except KeyboardInterrupt:
        status = 130
    except (ValueError, OSError, ArithmeticError, ImportError, RuntimeError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"dynamoe: error: {error}\n({TRACEBACK}=1 shows where)", file=sys.stderr)
        status = 1
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    command: Any = tyro.cli(
        _commands(arguments),
        prog="dynamoe",
        description="Mixture-of-experts and dynamic inference in JAX.",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitSubcommandPrefixes),
    )
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs what it also raises
    _keep_compiled_functions()
    return command.run(Console())


def _commands(arguments: list[str]) -> Any:
    """The commands as types for tyro; the defaults of `train` are those of the recipe that the arguments name."""
    from .commands.demo import Demo
    from .commands.evaluate import Evaluate
    from .commands.generate import Generate
    from .commands.train import Train
    from .recipes import standard_library
    from .serialization import load_recipe

    recipe = next((argument for argument in arguments[1:] if argument.endswith(".py")), None)
    experiment = standard_library.recipe() if recipe is None else load_recipe(Path(recipe)).recipe()
    return (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(experiment=experiment))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )


def _keep_compiled_functions() -> None:
    """Compile once per machine: JAX's persistent cache, unless the user has placed it elsewhere."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "dynamoe" / "xla"))
