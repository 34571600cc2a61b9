"""What a person sees of a run: a bar with speed, loss and ETA in a terminal, plain lines elsewhere."""

import time

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Progress of one run. On other processes than the first, `quiet` shows nothing."""

    def __init__(
        self, console: Console, *, name: str, step: int, steps: int, unit: str, units_per_step: int, quiet: bool
    ):
        self.console = console
        self.quiet = quiet
        self.units_per_second = 0.0
        self._unit = unit
        self._units_per_step = units_per_step
        self._steps = steps
        self._seconds, self._timed_steps, self._mark = 0.0, 0, None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=step, figures="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def speed_name(self) -> str:
        """Of the speed among the metrics: "tokens_per_second"."""
        return f"{self._unit}_per_second"

    def stepped(self, step: int) -> None:
        """A step is done. The first after a pause (compilation, evaluation) is not timed."""
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds += now - self._mark
            self._timed_steps += 1
            self.units_per_second = self._timed_steps * self._units_per_step / self._seconds
        self._mark = now
        self._bar.update(self._task, completed=step)

    def paused(self) -> None:
        """Something else than training takes time now."""
        self._mark = None

    def measured(self, step: int, loss: float) -> None:
        """Show a training loss, in nats per target."""
        figures = f"loss {loss:.3f}  {self.units_per_second:,.0f} {self._unit}/s"
        self._bar.update(self._task, figures=figures)
        if not self.quiet and not self.console.is_terminal:
            left = (self._steps - step) * self._units_per_step / max(self.units_per_second, 1e-9)
            eta = f"  ETA {left:,.0f} s" if self._timed_steps else ""
            self.console.print(f"step {step}/{self._steps}  {figures}{eta}", highlight=False, soft_wrap=True)

    def note(self, text: RenderableType) -> None:
        """A line or a table above the bar."""
        if not self.quiet:
            self._bar.console.print(text, highlight=False, soft_wrap=isinstance(text, str))
