"""What `holdfast evaluate scorers` shows, draws and writes of what it has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from holdfast.cli.evaluate.common import show_number, show_points, show_ratio, show_share

if TYPE_CHECKING:
    from holdfast.evaluation.scorer_results import Accuracies, Losses, Place

Measured = Mapping["Place", Mapping[str, Any]]
"""What was measured of a model: by scorer and budget, and by task (of text ''), results as plain values."""


def compared(models: Sequence[Measured]) -> dict[str, Accuracies | Losses]:
    """What was measured of models, together, by task; at the end of several tasks their mean."""
    from holdfast.evaluation.perplexity import PerplexityResult
    from holdfast.evaluation.scorer_results import Accuracies, Losses, SampleAnswers

    places = list(models[0])
    tasks = list(models[0][places[0]])
    if tasks == [""]:
        return {"": Losses({at: [PerplexityResult.from_dict(model[at][""]) for model in models] for at in places})}
    answers = {
        task: {at: [SampleAnswers.from_dict(model[at][task]) for model in models] for at in places} for task in tasks
    }
    found: dict[str, Accuracies | Losses] = {task: Accuracies({task: of_task}) for task, of_task in answers.items()}
    return found | ({f"mean of {len(tasks)} tasks": Accuracies(answers)} if len(tasks) > 1 else {})


def tables(models: Sequence[Measured], shown: Mapping[str, str], what: str) -> list[Table]:
    """A table for each task, and one of their mean: a row for each scorer, a column for each budget, and below them how
    the others differ from the first. Of several models the mean has an interval, and least and most stand in brackets.

    Args:
        models: what was measured, of all models with the same scorers, budgets and tasks.
        shown: what to call the scorers, in the order of the rows.
        what: has been measured.
    """
    reference, *others = shown
    budgets = list(dict.fromkeys(budget for _, budget in models[0]))
    made = []
    alone = [compared([model]) for model in models]
    for task, found in compared(models).items():
        each = [by_task[task] for by_task in alone]
        counted = _counted(found) + (f"; mean of {len(models)} models [least to most]" if len(models) > 1 else "")
        named = f"{task}: {what}" if task not in what else what
        table = Table(title=f"{named}, by slots per head: {counted} (95 % interval)")
        table.add_column("scorer", no_wrap=True)
        for budget in budgets:
            table.add_column(f"{budget:,}", justify="right")
        for scorer, name in shown.items():
            table.add_row(name, *(_shown(found, each, (scorer, budget)) for budget in budgets))
        table.add_section()
        for scorer in others:
            cells = (_beside(found, (scorer, budget), (reference, budget)) for budget in budgets)
            table.add_row(f"{scorer} beside {reference}", *cells)
        made.append(table)
    return made


def model_cells(found: Measured, reference: str) -> list[dict[str, Any]]:
    """What was measured of one model, ready for JSON: an entry for each scorer, budget and task, with its difference to
    that of the scorer `reference` at the same budget: of accuracies, or of mean negative log-likelihoods."""
    by_task = compared([found])
    entries = []
    for (scorer, budget), results in found.items():
        for task, values in results.items():
            difference = None
            if scorer != reference:
                estimate = by_task[task].difference((scorer, budget), (reference, budget))
                difference = {"to": reference, **estimate.to_dict()}
            named = {"scorer": scorer, "budget": budget} | ({"task": task} if task else {})
            entries.append({**named, **values, "difference": difference})
    return entries


def draw(models: Sequence[Measured], shown: Mapping[str, str], what: str, path: Path) -> None:
    """Draw all scorers by budget, of several tasks their mean; around several models the least and the most.

    Around one model: of accuracies their intervals; of perplexities those of the differences to the first scorer, since
    their own are far wider than any difference between scorers.
    """
    from holdfast.evaluation.scorer_results import Losses
    from holdfast.evaluation.scorers import plot_comparison

    task, together = list(compared(models).items())[-1]
    reference = next(iter(shown))
    each = [list(compared([model]).values())[-1] for model in models]
    values: dict[str, dict[int, list[float]]] = {name: {} for name in shown.values()}
    intervals: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in shown.values()}
    for scorer, budget in models[0]:
        at = scorer, budget
        values[shown[scorer]][budget] = [one.value(at) for one in each]
        around = together.interval(at)
        if isinstance(together, Losses):
            around = together.interval_beside(at, (reference, budget))
        intervals[shown[scorer]][budget] = around or (together.value(at),) * 2
    named = f"{what}, {task}" if task not in what else what
    if isinstance(together, Losses) and len(models) == 1:
        named += f"\n(bands: difference to {reference}, 95 %)"
    plot_comparison(values, path, what=named, intervals=intervals if len(models) == 1 else None)


def _counted(found: Accuracies | Losses) -> str:
    """How much one model was asked, or has read."""
    from holdfast.evaluation.scorer_results import Losses

    if isinstance(found, Losses):
        result = next(iter(found.found.values()))[0]
        return f"{result.tokens:,} tokens in {result.blocks:,} blocks"
    first = [next(iter(places.values()))[0] for places in found.found.values()]
    samples, answers = (sum(counts) for counts in zip(*((len(e.answers), sum(e.answers)) for e in first), strict=True))
    return f"{samples:,} samples" if samples == answers else f"{answers:,} answers in {samples:,} samples"


def _shown(found: Accuracies | Losses, each: Sequence[Accuracies | Losses], at: Place) -> str:
    """A value over its interval, and of several models over the least and the most."""
    from holdfast.evaluation.scorer_results import Losses

    if isinstance(found, Losses):
        number, form = show_number(found.value(at), found.interval(at)), ".3f"
    else:
        number, form = show_share(found.share(at)), ".1%"
    if len(each) > 1:
        values = [one.value(at) for one in each]
        number += f"\n[{min(values):{form}} to {max(values):{form}}]"
    return number.replace(" (", "\n(")


def _beside(found: Accuracies | Losses, at: Place, reference: Place) -> str:
    """A difference over its interval: of perplexities in percent, of accuracies in points."""
    from holdfast.evaluation.scorer_results import Losses

    show = show_ratio if isinstance(found, Losses) else show_points
    return show(found.difference(at, reference)).replace(" (", "\n(")
