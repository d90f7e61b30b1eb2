"""`holdfast evaluate`: a module of this package for each evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from holdfast.cli.common import model_directory, refuse_twice
from holdfast.cli.errors import UsageError, usage_errors
from holdfast.cli.evaluate.common import MODELS_FIRST, check_command
from holdfast.cli.evaluate.efficiency import Efficiency
from holdfast.cli.evaluate.needle import Needle
from holdfast.cli.evaluate.perplexity import Perplexity
from holdfast.cli.evaluate.recall import Recall
from holdfast.cli.evaluate.scorers import Scorers
from holdfast.cli.evaluate.suite import All
from holdfast.cli.evaluate.turns import Turns
from holdfast.cli.parsing import parse
from holdfast.settings import suggest

DESCRIPTION = """\
Measure trained models, each a directory or a model on the hub (OWNER/NAME[@REVISION]).

examples:
  holdfast evaluate needle runs/needle-lalte runs/needle-gdn --plot accuracy.png
  holdfast evaluate needle runs/needle-lalte --length 1024 --pairs 32 --beyond
  holdfast evaluate needle runs/books-lalte --tasks niah_single_1 niah_single_2 --haystack essays/ \\
      --length 1024 2048 4096 --json needle.json --plot needle.png
  holdfast evaluate recall runs/books-lalte --data dev-v2.0.json --skip-long
  holdfast evaluate turns runs/needle-lalte runs/needle-gdn --plot turns.png
  holdfast evaluate perplexity runs/books-lalte --data data/books --split validation --length 2048 --beyond
  holdfast evaluate perplexity runs/books-lalte runs/books-gdn --data data/books --plot perplexity.png
  holdfast evaluate scorers runs/demo/needle-lalte --budgets 16 32 64 --json scorers.json --plot scorers.png
  holdfast evaluate efficiency --contexts 1024 4096 16384 --batch-sizes 1 4 --json costs.json --plot costs.png
  holdfast evaluate efficiency runs/demo/needle-* --accuracy runs/demo/results.json --pareto pareto.png
  holdfast evaluate all runs/demo/needle-lalte runs/demo/needle-gdn-full --output evaluation
  holdfast evaluate lm-eval runs/books-lalte --tasks lambada_openai,arc_easy --batch_size 8

All but lm-eval keep what they have measured beside the file of --json, and continue there after an interruption.
`lm-eval MODEL [MODEL ...]` takes all options of `lm-eval run` (lm-evaluation-harness, `pip install 'holdfast[eval]'`).
"""


@dataclass(frozen=True)
class LmEval:
    """The tasks of lm-evaluation-harness (`pip install 'holdfast[eval]'`), with all options of its `run`."""

    arguments: tyro.conf.Positional[tuple[str, ...]]
    """Directories of trained models, or models on the hub (OWNER/NAME[@REVISION]); then options."""

    def run(self) -> None:
        """Never called: `run` below takes these arguments as they are. The class stands in the list of evaluations."""
        _lm_eval(self.arguments)


EVALUATIONS = (
    Annotated[Needle, tyro.conf.subcommand("needle")]
    | Annotated[Recall, tyro.conf.subcommand("recall")]
    | Annotated[Turns, tyro.conf.subcommand("turns")]
    | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
    | Annotated[Scorers, tyro.conf.subcommand("scorers")]
    | Annotated[Efficiency, tyro.conf.subcommand("efficiency")]
    | Annotated[LmEval, tyro.conf.subcommand("lm-eval")]
    | Annotated[All, tyro.conf.subcommand("all")]
)
NAMES = [get_args(kind)[1].name for kind in get_args(EVALUATIONS)]


def run(arguments: Sequence[str]) -> None:
    """Parse and run one of the evaluations."""
    if arguments and arguments[0] == "lm-eval":  # whose options are not known here
        return _lm_eval(arguments[1:])
    command = _parsed(arguments or ["--help"])
    check_command(command, arguments[0])
    command.run()


def _parsed(arguments: Sequence[str]) -> Any:
    """The evaluation that is asked for.

    Raises:
        UsageError: if there is none of this name, or an argument is wrong.
    """
    if not arguments[0].startswith("-") and arguments[0] not in NAMES:
        raise UsageError(f"There is no evaluation {arguments[0]!r}{suggest(arguments[0], NAMES)}.")
    try:
        return parse(EVALUATIONS, arguments, prog="holdfast evaluate", description=DESCRIPTION)
    except UsageError as error:
        taken = (name for name in arguments[1:] if repr(name) in str(error) and Path(name).is_dir())
        if (model := next(taken, None)) is None:
            raise
        raise UsageError(f"{error}; if {model} is a model, {MODELS_FIRST}.") from None


def _lm_eval(arguments: Sequence[str]) -> None:
    """Run the harness, as late as its options are known to be right: it takes seconds to import."""
    from holdfast.evaluation.harness_command import LISTS, list_tasks, read_options, show_help

    models = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = arguments[len(models) :]
    try:
        if not arguments or {"-h", "--help"} & set(options):
            print("usage: holdfast evaluate lm-eval MODEL [MODEL ...] [OPTIONS], with the options of this command:\n")
            return show_help()
        with usage_errors():
            read = read_options("MODEL", options)[1]
        if (what := LISTS.get(" ".join(read.tasks or ()))) is not None:
            return list_tasks(what, read)
        if not models:
            raise UsageError("Give the models first: `holdfast evaluate lm-eval MODEL_DIR --tasks TASKS [OPTIONS]`.")
        directories = [model_directory(model) for model in models]
        refuse_twice(models, directories)
        from holdfast.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; `pip install 'holdfast[eval]'` brings it.") from error
    run_harness([str(directory) for directory in directories], options)
