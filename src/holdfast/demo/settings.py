"""What may be chosen in the demonstration, and the recipes that follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.training.recipe import Recipe

TITLES = {
    "needle-gdn": "GDN",
    "needle-gdn-swa": "GDN + SWA",
    "needle-lalte": "laLTE",
    "needle-lansa": "laNSA",
    "needle-gdn-full": "GDN + full attention",
}
"""The recipes of the models and what the table calls them, in its order."""

SLOWEST_FIRST = ("needle-lansa", "needle-lalte", "needle-gdn-full", "needle-gdn-swa", "needle-gdn")
"""The order of training: the longest run must not begin last."""

SHORT_STEPS = 300
"""Optimizer steps of a shortened run: five models in about two minutes on two cores."""


@dataclass(frozen=True)
class DemoSettings:
    """What may be chosen in the demonstration.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    short: bool = False
    """Train for about two minutes only; the table says so."""
    output: Path = Path("runs/demo")
    """Where everything is written. What an earlier demo wrote there is replaced; a folder of something else is not."""
    seed: int = 0
    """Of the weights and the data. The questions asked at the end have seeds of their own."""
    keep: bool = False
    """Use models that an earlier demo has finished with the same settings, instead of training them anew."""
    steps: int | None = None
    """Optimizer steps of each model; left out: those of its recipe, or of the shortened run."""
    samples: int = 512
    """Samples that each model is measured on."""
    jobs: int | None = None
    """Models trained at a time, on one thread each; left out: as many as there are cores."""

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")

    def recipe(self, name: str) -> Recipe:
        """The recipe `name` as this demonstration trains it: a shortened run keeps the proportions of its schedule."""
        from holdfast.training.recipe import NeedleData, OutputSection, load_recipe

        recipe = load_recipe(name)
        training, data = recipe.training, recipe.data
        assert isinstance(data, NeedleData)
        steps = self.steps or (min(SHORT_STEPS, training.max_steps) if self.short else training.max_steps)
        scale = steps / training.max_steps
        # By first step: of stages that fall together the last one counts.
        stages = {round(start * scale): (pairs, length) for start, pairs, length in data.curriculum}
        curriculum = tuple((start, pairs, length) for start, (pairs, length) in sorted(stages.items()))
        return dataclasses.replace(
            recipe,
            training=dataclasses.replace(
                training,
                max_steps=steps,
                warmup_steps=min(round(training.warmup_steps * scale), steps - 1),
                seed=self.seed,
                log_every=max(1, min(training.log_every, steps // 20)),
                save_every=steps,  # nothing resumes a demo
            ),
            data=dataclasses.replace(data, curriculum=curriculum),
            output=OutputSection(directory=str(self.output), overwrite=True),
        )

    @property
    def shortened(self) -> bool:
        """Whether any model trains for fewer steps than its recipe says."""
        from holdfast.training.recipe import load_recipe

        return any(self.recipe(name).training.max_steps < load_recipe(name).training.max_steps for name in TITLES)
