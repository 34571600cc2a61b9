"""The report is one page that needs nothing else, and says what the run measured."""

import base64
import dataclasses
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.page import Figures, Picture, Sample, Section, Table, Text, write_report
from dynamoe.experiments.report import report_run
from dynamoe.experiments.router_tables import movement_table, router_table
from dynamoe.experiments.run_directory import RunDirectory
from dynamoe.experiments.training.routers import RouterStatistics, router_history
from dynamoe.experiments.training.routing_counts import RoutingCounts
from dynamoe.models import Decoder
from dynamoe.models.accounting import count_parts

PNG = b"\x89PNG\r\n\x1a\n and the rest"
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too'"
VOID = {"meta", "img", "link", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Reads a page; fails where tags do not close in order."""

    def __init__(self, file: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def written(folder: Path, *pieces: Any, title: str = "a run", lead: str = "It ended.") -> Page:
    file = folder / "report.html"
    assert write_report(file, title=title, lead=lead, sections=[Section("Result", pieces)]) == file
    return Page(file)


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    pieces = [
        Text(HOSTILE),
        Sample(HOSTILE, HOSTILE),
        Figures([(HOSTILE, HOSTILE)]),
        Table((HOSTILE, "b"), [(HOSTILE, HOSTILE)], HOSTILE),
        Picture(tmp_path / "x.png", HOSTILE),
    ]
    page = written(tmp_path, *pieces, title=HOSTILE, lead=HOSTILE)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 13  # twice the title; the picture's alt is no text
    assert page.images[0]["alt"] == HOSTILE


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    page = written(tmp_path, Picture(tmp_path / "x.png"))
    assert page.references == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_picture_that_is_no_png_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    written(tmp_path, Text("old"))
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"x\.png: it is no PNG"):
        written(tmp_path, Picture(tmp_path / "x.png"))
    assert "old" in Page(tmp_path / "report.html").text


def test_a_table_aligns_numbers_and_formats_them() -> None:
    table = Table(("name", "count", "share", "word"), [("1", 12345, 0.123456, "a"), ("2", 7, 2.0, "3")], total=True)
    assert table.cells == [["1", "12,345", "0.1235", "a"], ["2", "7", "2", "3"]]
    assert table.numeric == [False, True, True, False]  # the first column names the rows
    assert table.html().count('class="number"') == 2 * 3  # head and two rows
    assert table.html().count('class="total"') == 1
    assert Table(("a", "b"), []).numeric == [False, False]
    with pytest.raises(ValueError, match=r"a row has 1 cells, \['x'\]; the columns are \['a', 'b'\]"):
        Table(("a", "b"), [("x",)])


def test_the_router_tables_say_what_was_measured(tmp_path: Path) -> None:
    statistics = [
        RouterStatistics(1, np.array([0.5, 0.25, 0.25, 0.0]), np.full(4, 0.25), np.log(2), 1.0, 0.125),
        RouterStatistics(3, np.array([1.0]), np.array([1.0]), 0.0, 0.0, 0.0),
    ]
    table = router_table(statistics, "a text")
    assert table.cells[0] == ["1", "4", "2.000", "0.000", "1.000", "0.693", "0.500", "12.50%"]
    assert table.cells[1] == ["3", "1", "1.000", "1.000", "0.000", "0.000", "–", "0.00%"]
    write_metrics(tmp_path, steps=[1, 2, 3, 4, 5])
    table = movement_table(router_history(tmp_path))
    assert table.cells == [["1", "0.900 → 0.700 → 0.500", "0.100 → 0.300 → 0.500", "0.00%"]]
    assert table.caption == "Training batches of steps 1 → 3 → 5."


def write_metrics(run: Path, *, steps: list[int], routers: bool = True, evaluated: tuple[int, ...] = ()) -> None:
    lines: list[dict[str, Any]] = []
    for step in steps:
        lines.append({"step": step, "split": "train", "loss": 2.0 / step, "tokens_per_second": 1234.0})
        figures = {"load": [0.75, 0.25], "importance": [0.5, 0.5], "entropy": np.log(2) * (1 - step / 10)}
        figures |= {"max_violation": step / 10, "dropped": 0.0}
        if routers:
            named = {f"layers.1.{name}": value for name, value in figures.items()}
            lines.append({"step": step, "split": "routers", **named})
        if step in evaluated:
            lines.append({"step": step, "split": "held_out", "bits_per_byte": 2.125})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def started(tiny: Callable[..., Experiment], tmp_path: Path) -> Callable[..., Path]:
    """`started(model=...)`: a run of 6 steps that has begun and measured nothing yet."""

    def start(**options: Any) -> Path:
        run = tmp_path / "my run"
        RunDirectory.open(run, tiny(**options), facts={"source": {"kind": HOSTILE, "bytes": 54321}})
        return run

    return start


def test_the_report_of_a_mixture_has_its_figures_and_three_pictures(
    started: Callable[..., Path], tiny: Callable[..., Experiment]
) -> None:
    run = started()
    write_metrics(run, steps=[1, 2, 3, 4, 5, 6], evaluated=(3, 6))
    extra = Section("A sample", [Sample("def f():")])
    page = Page(report_run(run, baseline=("order-3 n-gram", 3.0), sections=[extra]))
    assert page.text.split()[:2] == ["my", "run"]
    total = count_parts(tiny().model, 16)[-1]
    shown = ("2.125", f"{6 * 4 * 16:,}", "1,234", f"{total.parameters:,}", f"{total.active_parameters:,.0f}")
    said = ("trained for 6 steps", "def f():", "the training batch of step 6", "AdamW(", "54,321", HOSTILE)
    for text in (*shown, f"{total.flops:,.0f}", *said):
        assert text in page.text, text
    assert "stopped on its way" not in page.text
    embedded = {base64.b64decode((image["src"] or "").split(",")[1]) for image in page.images}
    assert embedded == {(run / name).read_bytes() for name in ("loss.png", "routers.png", "expert_load.png")}


def test_the_report_of_an_interrupted_dense_run_shows_what_there_is(
    started: Callable[..., Path], dense_model: Decoder
) -> None:
    run = started(model=dense_model)
    write_metrics(run, steps=[1, 2], routers=False)
    page = Page(report_run(run))
    assert "A decoder of 2 layers (2 Dense), 2 of 6 steps logged so far." in page.text
    assert len(page.images) == 1 and not (run / "routers.png").exists()


def test_the_report_of_a_run_that_measured_nothing_says_so(started: Callable[..., Path]) -> None:
    page = Page(report_run(started()))
    assert "nothing was measured yet" in page.text and not page.images


def test_routers_measured_by_the_caller_are_shown_even_where_the_run_logged_none(started: Callable[..., Path]) -> None:
    run = started()
    write_metrics(run, steps=[1], routers=False)
    measured = ("a text of mine", [RouterStatistics(0, np.array([0.875, 0.125]), np.full(2, 0.5), 0.5, 0.75, 0.0)])
    page = Page(report_run(run, measured=measured))
    assert "Measured on a text of mine." in page.text and "1.750" in page.text
    assert len(page.images) == 2 and not (run / "routers.png").exists()


def counted(load: list[int], *, pairs: bool) -> RouterStatistics:
    """All of a text is one byte, "A"."""
    by_id, halves = np.array([load]), np.array([load, load])
    together = np.array([[load[0], min(load)], [min(load), load[1]]]) if pairs else np.diag(load)
    counts = RoutingCounts(together, 40, np.array([65]), np.array([40]), by_id, halves)
    shares = np.array(load) / sum(load)
    return RouterStatistics(1, shares, shares, 0.5, 0.5, 0.0, counts)


def test_what_the_experts_specialise_in_is_shown_and_an_older_picture_goes(started: Callable[..., Path]) -> None:
    run = started()
    write_metrics(run, steps=[1], routers=False)
    measured, other = ("a text", [counted([40, 24], pairs=True)]), ("another", [counted([16, 16], pairs=True)])
    page = Page(report_run(run, measured=measured, compared=[other]))
    for said in ("0 and 1", "A 100%", "A: a text; B: another", "0.125"):  # 5/8 against 1/2
        assert said in page.text, said
    assert len(page.images) == 5 and (run / "texts.png").is_file()
    page = Page(report_run(run, measured=("a text", [counted([40, 0], pairs=False)])))
    assert "In every layer that routes a token goes to one expert: there are no pairs to show." in page.text
    assert "dynamoe inspect --compare" in page.text and len(page.images) == 3
    assert not (run / "texts.png").exists() and not (run / "coactivation.png").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, tiny: Callable[..., Experiment]) -> None:
    with pytest.raises(ValueError, match="it is no run, there is no config.json in it"):
        report_run(tmp_path)
    model = dataclasses.replace(tiny().model, layers=1)
    RunDirectory.open(tmp_path / "model", model)
    with pytest.raises(ValueError, match="holds a Decoder; it must be the run of an Experiment"):
        report_run(tmp_path / "model")
