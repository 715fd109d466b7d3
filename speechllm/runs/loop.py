"""The steps of a training: what every training does at each of them, whatever it trains."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from speechllm.runs.run import Run, RunError
from speechllm.runs.signals import Interrupted, handled
from speechllm.training.schedule import seed_step

MOST_SKIPPED = 10  # steps in a row without finite numbers, after which a training ends
NAMED = 5  # recordings that are named when a step is skipped


class Stateful(Protocol):
    """Something that is saved in a checkpoint, such as a module or an optimizer."""

    def state_dict(self) -> Mapping[str, Any]:
        """For `torch.save`."""

    def load_state_dict(self, state: Any) -> Any:
        """Restore what `state_dict` returned."""


class Parts(dict[str, Any]):
    """Several `Stateful` things by name, as one."""

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.items():
            part.load_state_dict(state[name])


class TrainingLoop:
    """`for step in loop` runs the steps of a training that are not done yet.

    On creation the newest checkpoint of the run is loaded into `state`. Every step is seeded by its number. After
    every `save_every` steps there is a checkpoint (none with None), also after the step in which SIGTERM, SIGUSR1 or
    Ctrl-C arrives, which then ends the training with Interrupted. In several processes all iterate, and call `skips` in
    every step.

    done: finished steps, including the present one. figures: what was logged last, also of a resumed run.
    """

    def __init__(self, run: Run, state: Stateful, name: str, *, steps: int, seed: int, save_every: int | None):
        """name: shown in front of the progress bar. Raises RunError for a checkpoint that does not fit `state`."""
        self.run, self.state, self.name = run, state, name
        self.steps, self.seed, self.save_every = steps, seed, save_every
        self.done = 0
        self.figures: dict[str, float] = {}
        self._skipped = 0  # in a row
        self._asked: int | None = None  # signal that this process received
        self._stopping = False  # agreed by several processes
        held = run.resume()
        if held is None:
            return
        self.done, self.figures = held["step"], held.get("figures", {})
        if self.done > steps:
            raise RunError(f"{run.folder} has done {self.done} steps already: set steps to at least that, not {steps}")
        try:
            state.load_state_dict(held)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"the checkpoint of step {self.done} in {run.folder} does not fit this training ({reason}): another "
                "version wrote it; choose another output folder"
            ) from error

    def __iter__(self) -> Iterator[int]:
        process = self.run.accelerator.process_index if self.run.accelerator else 0
        with self.run.steps(self.done, self.steps, self.name) as self._bar, handled(self._ask):
            for step in self._bar:
                seed_step(self.seed, step, process)
                self.done = step + 1
                yield step
                self._end_step()

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.done % every == 0 or self.done == self.steps

    def log(self, **figures: float) -> None:
        """Log figures of the present step, and show the first one."""
        self.figures = figures
        self.run.log(self.done, **figures)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in list(figures.items())[:1]})

    def skips(self, *numbers: Tensor | None, recordings: Callable[[], Sequence[str]]) -> bool:
        """Whether this step must leave everything as it was, because loss or gradient are not finite.

        numbers: losses and gradient norms, without those that are None; recordings: returns what the batch of this
        process was made from. All processes get the same answer, for which the host waits once. The step is counted in
        the log. Raises RunError for MOST_SKIPPED in a row, or if the training would end with more than one.
        """
        found = [number.full_tensor() if isinstance(number, DTensor) else number for number in numbers if number is not None]
        finite = torch.stack([number.detach().isfinite().all() for number in found]).all()
        if self._several:
            flags = torch.stack([~finite, finite.new_tensor(self._asked is not None)]).float()
            broken, self._stopping = map(bool, self.run.accelerator.reduce(flags).tolist())
        else:
            broken = not finite
        self._skipped = self._skipped + 1 if broken else 0
        if broken:
            named = [*recordings()]
            self._count(gather_object(named) if self._several else named)
        return broken

    def _count(self, recordings: Sequence[str]) -> None:
        if self._skipped == MOST_SKIPPED or (self.done == self.steps and self._skipped > 1):
            raise RunError(
                f"loss or gradient norm were not finite in {self._skipped} steps in a row, the last one step {self.done}; "
                'the last checkpoint is kept: try a lower learning_rate or precision="no" in another output folder, or '
                f"look at the recordings of that batch: {', '.join(recordings)}"
            )
        self.run.log(self.done, non_finite=1)
        if self.run.main:
            more = f" and {len(recordings) - NAMED} more" if len(recordings) > NAMED else ""
            named = ", ".join(recordings[:NAMED]) + more
            self._bar.write(f"step {self.done} is skipped, loss or gradient norm are not finite; its batch: {named}")

    @property
    def _several(self) -> bool:
        return self.run.accelerator is not None and self.run.accelerator.num_processes > 1

    def _ask(self, number: int) -> None:
        self._asked = number
        if self.run.main:  # os.write, because print may be what was interrupted
            again = " (again: at once)" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the training ends after this step{again}\n".encode())

    def _end_step(self) -> None:
        # a signal that some processes know of counts from the step on in which all do
        if self._stopping if self._several else self._asked is not None:
            number = self._asked or signal.SIGTERM
            if not self.save_every:
                raise Interrupted(number, "this kind of training has no checkpoints, so the same command starts anew")
            self._save()
            raise Interrupted(number, f"step {self.done} is saved, and the same command goes on from there")
        # what precedes steps without finite numbers may be their cause, and must not replace an older checkpoint
        if self.save_every and self.done % self.save_every == 0 and self.done < self.steps and not self._skipped:
            self._save()

    def _save(self) -> None:
        self.run.save(self.done, {"figures": self.figures, **self.state.state_dict()})
        if self._several:
            self.run.accelerator.wait_for_everyone()  # the end of another process must not end the one that writes
