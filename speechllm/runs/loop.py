"""The steps of a training: what every training does at each of them, whatever it trains."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

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
        """Copies on the CPU: it is written while the next steps change the parts."""
        state = {name: part.state_dict() for name, part in self.items()}
        return tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.items():
            part.load_state_dict(state[name])


class StepGuard:
    """Watches the steps of a training for numbers that are not finite and for signals to end.

    steps: of the whole training. In several processes all call `skips` in every step. skipped: steps in a row that were
    to be skipped, up to the present one.
    """

    def __init__(self, run: Run, steps: int):
        self.run, self.steps = run, steps
        self.skipped = 0
        self._asked: int | None = None  # the signal that this process received
        self._agreed = False  # that some process received one

    def catching(self) -> AbstractContextManager[None]:
        """While active, a signal to end only sets `signal`, so that the step in progress is finished."""
        return handled(self._ask)

    @property
    def signal(self) -> int | None:
        """The signal after which to end now. Several processes see it in the same step, in which all know of it."""
        if self._several:
            return self._asked or signal.SIGTERM if self._agreed else None
        return self._asked

    def skips(self, done: int, *numbers: Tensor | float | None, recordings: Callable[[], Sequence[str]]) -> bool:
        """Whether a step must leave everything as it was, because loss or gradient are not finite.

        done: the steps with this one; numbers: losses and gradient norms, on any device (torch's norm of no gradients
        is on the CPU, DeepSpeed's is a float), without those that are None; recordings: returns what the batch of this
        process was made from. All processes get the same answer, for which the host waits once. The step is counted in
        the log. Raises RunError for MOST_SKIPPED in a row, or if the training would end with more than one.
        """
        full = [n.full_tensor() if isinstance(n, DTensor) else torch.as_tensor(n) for n in numbers if n is not None]
        each = [number.detach().isfinite().all() for number in full]
        device = max((one.device for one in each), key=lambda device: device.type != "cpu")
        finite = torch.stack([one.to(device) for one in each]).all()
        if self._several:
            assert self.run.accelerator is not None
            flags = torch.stack([~finite, finite.new_tensor(self._asked is not None)]).float()
            broken, self._agreed = map(bool, self.run.accelerator.reduce(flags).tolist())
        else:
            broken = not finite
        self.skipped = self.skipped + 1 if broken else 0
        if broken:
            named = [*recordings()]
            self._count(done, gather_object(named) if self._several else named)
        return broken

    def _count(self, done: int, recordings: Sequence[str]) -> None:
        if self.skipped == MOST_SKIPPED or (done == self.steps and self.skipped > 1):
            raise RunError(
                f"loss or gradient norm were not finite in {self.skipped} steps in a row, up to step {done}; the last "
                "checkpoint is kept: try a lower learning_rate or precision=no in another output folder, or look at "
                f"what that batch was made from: {', '.join(recordings)}"
            )
        self.run.log(done, non_finite=1)
        if self.run.main:
            more = f" and {len(recordings) - NAMED} more" if len(recordings) > NAMED else ""
            named = ", ".join(recordings[:NAMED]) + more
            tqdm.write(f"step {done} is skipped, loss or gradient norm are not finite; its batch: {named}")

    @property
    def _several(self) -> bool:
        return self.run.accelerator is not None and self.run.accelerator.num_processes > 1

    def _ask(self, number: int) -> None:
        self._asked = number
        if self.run.main:  # os.write, because print may be what was interrupted
            again = " (again: at once)" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the training ends after this step{again}\n".encode())


class TrainingLoop:
    """`for step in loop` runs the steps of a training that are not done yet.

    On creation the newest checkpoint of the run is loaded into `state`. Every step is seeded by its number. After
    every `save_every` steps there is a checkpoint (none with None), which is written beside the next steps, also after
    the step in which SIGTERM, SIGUSR1 or Ctrl-C arrives, which then ends the training with Interrupted. In several
    processes all iterate, and call `skips` in every step.

    done: finished steps, including the present one. figures: what was logged last, also of a resumed run.
    """

    def __init__(
        self,
        run: Run,
        state: Stateful,
        name: str,
        *,
        steps: int,
        seed: int,
        save_every: int | None,
        labels: object = None,
        keep_last: bool = False,
    ):
        """name: shown in front of the progress bar. state: its `state_dict` returns copies, as that of `Parts` does.

        labels: as in `Run.require_labels`. keep_last: save after the last step, too, because what follows takes long.
        Raises RunError for a checkpoint that does not fit `state`, or of a run with other labels.
        """
        self.run, self.state, self.name = run, state, name
        self.steps, self.seed, self.save_every, self.keep_last = steps, seed, save_every, keep_last
        self.guard = StepGuard(run, steps)
        self.done = 0
        self.figures: dict[str, float] = {}
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        held = run.resume()
        if labels is not None:
            run.require_labels(labels, resumed=held is not None)
        if held:
            self._load(held)

    def _load(self, held: dict[str, Any]) -> None:
        self.done, self.figures = held["step"], held.get("figures", {})
        if self.done > self.steps:
            raise RunError(
                f"{self.run.folder} has done {self.done} steps already: set steps to at least that, not {self.steps}"
            )
        try:
            self.state.load_state_dict(held)
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(
                f"the checkpoint of step {self.done} in {self.run.folder} does not fit this training "
                f"({str(error).splitlines()[0]}): another version wrote it; choose another output folder"
            ) from error

    def __iter__(self) -> Iterator[int]:
        process = self.run.accelerator.process_index if self.run.accelerator else 0
        try:
            with self.run.steps(self.done, self.steps, self.name) as self._bar, self.guard.catching():
                for step in self._bar:
                    seed_step(self.seed, step, process)
                    self.done = step + 1
                    yield step
                    self._end_step()
            self._finish_writing()
        finally:  # a training may stop early, and its checkpoints are deleted when it is finished
            self._writer.shutdown()

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.done % every == 0 or self.done == self.steps

    def log(self, **figures: float) -> None:
        """Log figures of the present step, and show the first one."""
        self.figures = figures
        self.run.log(self.done, **figures)
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in list(figures.items())[:1]})

    def skips(self, *numbers: Tensor | float | None, recordings: Callable[[], Sequence[str]]) -> bool:
        """Whether this step must leave everything as it was: see `StepGuard.skips`."""
        return self.guard.skips(self.done, *numbers, recordings=recordings)

    def _end_step(self) -> None:
        if (number := self.guard.signal) is not None:
            if not self.save_every:
                raise Interrupted(number, "this kind of training has no checkpoints, the same command starts it anew")
            self._save()
            self._finish_writing()
            raise Interrupted(number, f"step {self.done} is saved, and the same command goes on from there")
        # what precedes steps without finite numbers may be their cause, and must not replace an older checkpoint
        due = self.save_every and self.done % self.save_every == 0 and self.done < self.steps
        if (due or (self.keep_last and self.done == self.steps)) and not self.guard.skipped:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint in a thread. Raises RunError if the one before could not be written."""
        self._wait_for_writing()
        # every process asks for a state that is spread over them
        state = self.state.state_dict() if self.run.main or not isinstance(self.state, Parts) else {}
        if self.run.main:
            state = {"figures": self.figures, **state}
            self._writing = self._writer.submit(self.run.save, self.done, state)

    def _finish_writing(self) -> None:
        self._wait_for_writing()
        if self.run.accelerator is not None:
            self.run.accelerator.wait_for_everyone()  # no process may end while the main one writes

    def _wait_for_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None
