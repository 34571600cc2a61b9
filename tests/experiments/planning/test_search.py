"""Meshes compared: by formulas all, compiled the best few."""

import dataclasses

import pytest

from dynamoe.experiments.planning import formulas
from dynamoe.experiments.planning.search import search_meshes
from dynamoe.experiments.planning.target import find_target


def test_the_best_few_are_compiled_and_the_fastest_that_fits_wins(tiny, planned_without_compiling):
    notes = []
    found = search_meshes(tiny(), find_target("v5e"), notes.append)
    assert len(planned_without_compiling) == 5 == sum(one.compiled is not None for one in found.candidates)
    assert found.winner is not None and found.winner.placement.mesh.shape["expert"] == 2
    assert found.winner is found.candidates[0]
    fits = [one.fits for one in found.candidates if one.compiled is not None]
    assert fits == sorted(fits, reverse=True)
    assert notes[1].startswith("compiling 1 of 5: ") and notes[-1].startswith("compiling 5 of 5: ")


def test_what_should_fit_is_compiled_before_what_should_not(tiny, planned_without_compiling, monkeypatch):
    everything = search_meshes(tiny(), find_target("v5e"), lambda text: None).candidates
    totals = sorted(one.formulas.memory.total for one in everything)
    monkeypatch.setattr(formulas, "capacity", lambda chip: totals[2])  # the three smallest fit
    found = search_meshes(tiny(), find_target("v5e"), lambda text: None)
    compiled = [one.formulas.memory.total for one in found.candidates if one.compiled is not None]
    assert set(totals[:5]) == set(compiled)  # of those that do not fit, the ones that miss least


def test_meshes_that_do_not_divide_are_counted_with_the_reason(tiny, planned_without_compiling):
    experiment = tiny(batch_size=2)  # the batch divides over two devices at most, so over tensor go two or four
    found = search_meshes(experiment, find_target("v5e"), lambda text: None)
    assert len(found.candidates) + len(found.refused) == 10
    assert {one.placement.mesh.shape["tensor"] for one in found.candidates} == {2}  # two heads do not divide by four
    assert any("has length 2; it must be a multiple of 4" in why for _, why in found.refused)
    assert found.winner is None  # none of them fits


def test_meshes_that_a_slice_cannot_hold_are_counted(tiny, planned_without_compiling):
    experiment = tiny(batch_size=64)
    found = search_meshes(experiment, find_target("v5p", "4x4x4"), lambda text: None)
    assert len(found.candidates) + len(found.refused) == 20
    assert found.unheld == 64  # of 84 ways to write 64 as a product of four


def test_where_nothing_divides_the_first_reason_is_told(tiny, no_compiler):
    experiment = tiny(batch_size=1)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab=259))
    with pytest.raises(ValueError, match="none of the 10 meshes that v5e 2x2 can hold divides this exp.*; MeshShape"):
        search_meshes(experiment, find_target("v5e"), lambda text: None)
