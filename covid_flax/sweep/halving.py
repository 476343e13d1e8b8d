"""Which trials are worth going on with: Optuna's successive halving, for --sweep=halving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from covid_flax.errors import UserError
from covid_flax.sweep.plan import Plan, Trial, config_of
from covid_flax.sweep.validation import best_of

_REDUCTION = 3  # of successive halving: one trial in so many goes on from a rung


class Halving:
    """Optuna's successive halving, kept in DIR/halving.journal: which trials are worth going on.

    It is asynchronous (Li et al. 2020): a trial that reaches a rung goes on if it is among the
    best third of those that reached it so far, so the first trials run longer than they would
    if all waited for each other.
    """

    def __init__(self, plan: Plan, workdir: Path):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "--sweep=halving needs Optuna: pip install -e '.[sweep]', or take --sweep=random"
            ) from None
        self._optuna, self._plan, self._workdir = optuna, plan, workdir
        self._trials: dict[str, Any] = {}

    def open(self) -> None:
        """The folder's study, begun or gone on with."""
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna, plan = self._optuna, self._plan
        journal = self._workdir / "halving.journal"
        _cut_half_a_line(journal)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = max(1, plan.config.train.epochs // _REDUCTION**2)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            load_if_exists=True,
            direction="minimize" if plan.monitor == "val_loss" else "maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=_REDUCTION
            ),
        )
        for old in self._study.get_trials(deepcopy=False):
            if old.state == optuna.trial.TrialState.RUNNING and "trial" in old.user_attrs:
                # Interrupted, or failed: it goes on as what it was, not as its own rival.
                name = old.user_attrs["trial"]
                self._trials[name] = optuna.trial.Trial(self._study, old._trial_id)

    def _trial(self, trial: Trial) -> Any:
        if trial.name not in self._trials:
            self._trials[trial.name] = self._study.ask()
            self._trials[trial.name].set_user_attr("trial", trial.name)
            self._trials[trial.name].set_user_attr("settings", trial.settings)
        return self._trials[trial.name]

    def _best(self, trial: Trial, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        train = config_of(self._plan.config, trial).train
        return best_of(records, self._plan.monitor, train.min_delta, train.swa_start)

    def judge(self, trial: Trial) -> Callable[[list[dict[str, Any]]], bool]:
        """Of the trial: whether its records so far say to stop it."""
        of = self._trial(trial)
        reported = set(self._study.get_trials(deepcopy=False)[of.number].intermediate_values)

        def stops(records: list[dict[str, Any]]) -> bool:
            for i, record in enumerate(records):
                best = self._best(trial, records[: i + 1])
                if record["epoch"] in reported or best is None:
                    continue
                reported.add(record["epoch"])
                of.report(best[self._plan.monitor], record["epoch"])
                if of.should_prune():
                    return True
            return False

        return stops

    def tell(self, trial: Trial, state: str, records: list[dict[str, Any]]) -> None:
        """Ends the trial in the study. One that failed stays open there until it is tried again."""
        states, of = self._optuna.trial.TrialState, self._trial(trial)
        best = self._best(trial, records)
        if state == "complete" and best is not None:
            self.judge(trial)(records)  # the epochs since it was last looked at
            self._study.tell(of, best[self._plan.monitor], states.COMPLETE)
        elif state == "pruned":
            self._study.tell(of, state=states.PRUNED)
        del self._trials[trial.name]


def _cut_half_a_line(journal: Path) -> None:
    """What a full disk left of a line would spoil the next one, which Optuna writes behind it."""
    if journal.exists():
        with open(journal, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
