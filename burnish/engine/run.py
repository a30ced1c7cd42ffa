"""A run: its folder, its metrics, its checkpoints, and how it stops and goes on."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from burnish.config import Stopped, to_yaml
from burnish.engine import checkpoints
from burnish.engine.environment import environment
from burnish.engine.learner import Learner, NonFinite
from burnish.engine.memory import Explained, Peak, explained_peak, in_use, measured_peak
from burnish.engine.mesh import laid_like
from burnish.engine.room import Halfway, NoRoom, Shortage, ran_out
from burnish.engine.shortage import Moment, holdings, out_of_memory, told, told_taking
from burnish.engine.trackers import Tracker, open_trackers
from burnish.model.decoder import Decoder
from burnish.optim.adamw import optimizer_tensors, restore_optimizer, state_bytes
from burnish.settings import TrainingSettings


class Stateful(Protocol):
    """Something beside weights that a continued run must find as it was."""

    def state(self) -> dict[str, Any]:
        """Everything that it remembers, as a JSON object."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` gave, in place of what it has."""
        ...


class Run:
    """A run in progress. Use it as a context manager, walk `steps`, and `log` what each step gave.

    The folder holds config.yaml, environment.json, metrics.jsonl (a line a step), checkpoints/step-N/, what trackers
    write, and in the end the result. A run continued from a checkpoint, on the same machine with as many ranks, gives
    the weights, optimizer state, counters and metrics that the uninterrupted one would have given, bit for bit; only
    times differ. `data_fingerprint` names the data and its order: continuing with other data is refused. `states` are
    what else must go on where it was: a controller, running statistics.
    """

    def __init__(
        self,
        config: TrainingSettings,
        learners: Sequence[Learner],
        model: nn.Module,
        total_steps: int,
        data_fingerprint: str,
        states: Mapping[str, Stateful] | None = None,
    ) -> None:
        anew = config.model_copy(update={"save": config.save.model_copy(update={"resume": False})})
        self.folder, self.save, self.config_yaml = Path(config.run.folder), config.save, to_yaml(anew)
        self.config = config
        self.learners, self.model, self.mesh, self.total_steps = learners, model, learners[0].mesh, total_steps
        self.states = states or {}
        self.parameters = {name: p for learner in learners for name, p in learner.parameters.items()}
        self.data_fingerprint = f"{data_fingerprint} over {self.mesh.world} ranks"
        self.step, self.num_tokens, self.seconds, self.peak_bytes = 0, 0.0, 0.0, 0
        self.explained: dict[str, Any] | None = None
        """The peak of one step: which, how many bytes, in which phase, what held them, and whether graphs did too."""
        self.best_eval_loss: float | None = None
        self.eval_loss: float | None = None
        self.trackers: list[Tracker] = []
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._saved_step: int | None = None
        self._measured_step = min(2, total_steps)
        self._step_began = time.perf_counter()
        self._measuring = ExitStack()
        self._told_taking = False
        self._updates: int | None = None
        """Those that learners had taken when the step under way began; None: no step is under way."""
        self._began = False
        for learner in learners:
            learner.room.told = self._tell_shortage

    def __enter__(self) -> Self:
        if self.mesh.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"run.folder={self.folder} cannot be made: {error.strerror}") from None
            self._write_text("config.yaml", self.config_yaml)
            self.write_json("environment.json", environment(self.mesh.device, self.mesh.world))
        if self.save.resume:
            self._restore()
        elif self.mesh.is_main:
            for name in ("before.json", "after.json"):  # of a run that failed before its first step
                (self.folder / name).unlink(missing_ok=True)
        if self.mesh.is_main:
            self.metrics_file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            self.trackers = open_trackers(self.save.trackers, self.folder, self.config_yaml, self.step)
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not self.mesh.is_main)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listen(False)
        self.bar.close()
        with suppress(OSError) if error else nullcontext():  # a full disk, say, is what ended the run: told once
            for tracker in self.trackers:
                tracker.close()
            if self.mesh.is_main:
                self.metrics_file.close()
        if isinstance(error, NonFinite):
            raise ValueError(self._report_non_finite(error)) from None
        if error is not None and (isinstance(error, NoRoom | Halfway) or ran_out(error)):
            held = holdings(self.model, self.parameters, sum(state_bytes(own.optimizer) for own in self.learners))
            moment = self._moment(error)
            said = out_of_memory(error, moment, self.config, self.mesh, held)
            changed = isinstance(error, Halfway) or moment.stage in ("later", "after")
            raise MemoryError(
                f"{said}. {checkpoints.what_stays(self._checkpoint_folder)}" if changed else said
            ) from None

    def steps(self) -> Iterator[int]:
        """The steps still to take, counted from 0.

        Saves a checkpoint when one is due, when an evaluation is the best so far, and when asked to stop. Raises
        Stopped after SIGTERM or Ctrl-C on any rank, once the step under way is done and saved.
        """
        self._listen(True)
        if isinstance(self.model, Decoder):
            self.model.in_training = True
        while self.step < self.total_steps:
            self._step_began, self.eval_loss = time.perf_counter(), None
            peak = self._measuring.enter_context(self._measured())
            self._began, self._updates = True, self._num_updates()
            yield self.step
            self._updates = None
            self._measuring.close()
            self.peak_bytes = max(self.peak_bytes, peak.bytes)
            self._explain(peak)
            self.step += 1
            self.bar.update()
            last, stop = self.step == self.total_steps, self.mesh.any(self._signal is not None)
            if last or stop or self._improved() or (self.save.every and self.step % self.save.every == 0):
                self.checkpoint()
            if stop:
                raise Stopped(
                    f"asked to stop, and saved at step {self.step} of {self.total_steps}; "
                    f"go on with the same command and save.resume=true"
                )
        self._listen(False)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the step under way, as the learner gave them; what follows is not part of the step."""
        took = time.perf_counter() - self._step_began
        self._measuring.close()
        self._tell_taking()
        self.seconds += took
        self.num_tokens += metrics["tokens"]
        if (self.step + 1) % self.save.log_every == 0 or self.step in (0, self.total_steps - 1):
            rate, memory = metrics["tokens"] / took, in_use(self.mesh.device)
            self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {rate:,.0f} tok/s, {memory / 2**30:.2f} GiB")
            resources = {"tokens_per_second": rate, "memory_bytes": memory, "seconds": self.seconds}
            limits = [learner.room.limit for learner in self.learners if learner.room.limit is not None]
            resources |= {"microbatch_tokens": min(limits)} if limits else {}  # where memory has once run out
            self._write({**metrics, "num_tokens": self.num_tokens, **resources})

    def log_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Record what an evaluation after the step under way gave; the lowest `eval_loss` makes the best checkpoint."""
        self.eval_loss = metrics.get("eval_loss")
        self._write(metrics)

    def _write(self, metrics: Mapping[str, float]) -> None:
        if self.mesh.is_main:
            try:
                self.metrics_file.write(json.dumps({"step": self.step + 1, **metrics}) + "\n")
                self.metrics_file.flush()
            except OSError as error:
                stays = checkpoints.what_stays(self._checkpoint_folder)
                raise OSError(f"{self.metrics_file.name} could not be written ({error.strerror}); {stays}") from None
        for tracker in self.trackers:
            tracker.log(self.step + 1, metrics)

    def _improved(self) -> bool:
        best = self.eval_loss is not None and (self.best_eval_loss is None or self.eval_loss < self.best_eval_loss)
        if best:
            self.best_eval_loss = self.eval_loss
        return best

    def checkpoint(self) -> None:
        """Save everything that continuing needs. Every rank calls it; the main one writes."""
        if self._saved_step == self.step:
            return
        weights, optimizer = self.mesh.gather(self.parameters), self.mesh.gather(self._optimizer_tensors())
        states = self.mesh.collect(checkpoints.random_state(self.mesh.device))
        if self.mesh.is_main:
            random = {f"{name}.{rank}": state for rank, own in enumerate(states) for name, state in own.items()}
            os.fsync(self.metrics_file.fileno())
            state = {
                "step": self.step,
                "steps_taken": [learner.steps_taken for learner in self.learners],
                "limits": [learner.room.limit for learner in self.learners],
                "states": {name: stateful.state() for name, stateful in self.states.items()},
                "num_tokens": self.num_tokens,
                "seconds": self.seconds,
                "peak_bytes": self.peak_bytes,
                "explained": self.explained,
                "eval_loss": self.eval_loss,
                "best_eval_loss": self.best_eval_loss,
                "metrics_bytes": self.metrics_file.tell(),
                "data": self.data_fingerprint,
            }
            tensors = {"weights": weights, "optimizer": optimizer, "random": random}
            checkpoints.save_checkpoint(self._checkpoint_folder / f"step-{self.step:08d}", tensors, state)
            checkpoints.prune(self._checkpoint_folder, self.save.keep)
        self._saved_step = self.step
        self.mesh.wait()

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, kept in the folder as name.json, so that a continued run does not do it again."""
        path = self.folder / f"{name}.json"
        if self.mesh.any(
            self.mesh.is_main and path.exists()
        ):  # the main rank decides: others may see the file too soon
            return self.mesh.collect(json.loads(path.read_text(encoding="utf-8")) if self.mesh.is_main else None)[0]
        self.bar.set_description(f"measuring {name} training")
        value = work()
        self.bar.set_description("training")
        self.bar.unpause()  # what is measured is no part of the time that is left
        self.write_json(path.name, value)
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the folder, whole or not at all."""
        if self.mesh.is_main:
            self._write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        aside = self.folder / f".{name}"
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.folder / name)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(f"{self.folder / name} could not be written ({error.strerror})") from None

    @contextmanager
    def _measured(self) -> Generator[Peak]:
        """The peak memory of a step: each on CUDA; on the CPU, where counting is slow, this process's second.

        That of the second is explained too, unless answers are written in it on CUDA: a record of all that took and
        gave back memory meanwhile would be long.
        """
        device = self.mesh.device
        self._measured_step -= 1
        writes = device.type == "cuda" and hasattr(self.config, "rollout")
        if self._measured_step == 0 and isinstance(self.model, Decoder) and not writes:
            with explained_peak(self.model, self.learners) as peak:
                yield peak
        elif device.type == "cuda" or self._measured_step == 0:
            held: list[Tensor] = []
            if device.type != "cuda":  # which counts by itself
                held = [*self.model.parameters(), *self.model.buffers(), *self._optimizer_tensors().values()]
            with measured_peak(device, held) as peak:
                yield peak
        else:
            yield Peak()

    def _explain(self, peak: Peak) -> None:
        """Keep what held the peak, where it is known and higher than that of a step before."""
        if not isinstance(peak, Explained) or peak.bytes <= (self.explained or {"bytes": 0})["bytes"]:
            return
        fused = self.model.fused if isinstance(self.model, Decoder) else None
        graphs = fused is not None and fused.graphs is not None
        found = {"step": self.step + 1, "bytes": peak.bytes, "phase": peak.phase, "graphs": graphs}
        self.explained = found | {"classes": peak.classes}

    def _num_updates(self) -> int:
        return sum(learner.steps_taken for learner in self.learners)

    def _moment(self, error: BaseException) -> Moment:
        """When it was that memory ran out."""
        if self._updates is None:  # between steps, or before or after all
            return Moment(self.step, "after") if self._began else Moment(self.step + 1, "before")
        if self._num_updates() == self._updates:
            return Moment(self.step + 1, "in")
        return Moment(self.step + 1, "later" if isinstance(error, Halfway) or _in_step(error) else "after")

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        states = [optimizer_tensors(learner.optimizer, learner.parameters) for learner in self.learners]
        return {name: tensor for state in states for name, tensor in state.items()}

    @property
    def _checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    def _restore(self) -> None:
        newest = checkpoints.newest_checkpoint(self._checkpoint_folder)
        if newest is None:  # stopped before its first checkpoint: it goes on from the beginning
            if self.mesh.is_main:
                tqdm.write(f"{self.folder} holds no checkpoint to go on from: starting anew", file=sys.stderr)
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        tensors, state = checkpoints.load_checkpoint(newest)
        if state["data"] != self.data_fingerprint:
            raise ValueError(
                f"run.folder={self.folder}: the data, its order or the number of ranks is not what it was at "
                f"{newest.name}; resume with the same, or start anew with another run.folder"
            )
        for name, parameter in self.parameters.items():
            with torch.no_grad():  # and not by way of .data, which leaves no trace that the weights have changed
                parameter.copy_(laid_like(tensors["weights"][name], parameter.data))
        optimizer = {
            name: laid_like(tensor, like) if tensor.ndim and isinstance(like, DTensor) else tensor
            for name, tensor in tensors["optimizer"].items()
            for like in (self.parameters[name.rsplit(".", 1)[0]].data,)  # whoever is whole moves it where it belongs
        }
        for learner, taken in zip(self.learners, state["steps_taken"], strict=True):
            restore_optimizer(learner.optimizer, learner.parameters, optimizer)
            learner.steps_taken = taken
        for learner, limit in zip(self.learners, state.get("limits", ()), strict=False):  # older checkpoints have none
            learner.room.limit = limit
        for name, stateful in self.states.items():
            stateful.restore(state["states"][name])
        own = f".{self.mesh.rank}"
        states = {name.removesuffix(own): state for name, state in tensors["random"].items() if name.endswith(own)}
        checkpoints.restore_random_state(states, self.mesh.device)
        self.step = self._saved_step = state["step"]
        self.num_tokens, self.seconds, self.peak_bytes = state["num_tokens"], state["seconds"], state["peak_bytes"]
        self.best_eval_loss, self.explained = state["best_eval_loss"], state.get("explained")
        self._measured_step = min(2, self.total_steps - self.step)
        if self.mesh.is_main:  # lines of steps after the checkpoint are about to be written again
            with (self.folder / "metrics.jsonl").open("r+b") as file:
                file.truncate(state["metrics_bytes"])

    def _listen(self, on: bool) -> None:
        """Take signals as a wish to stop after the step under way; outside the steps they do what they always do."""
        if on:
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: stop at once; job schedulers send SIGTERM twice and mean once
        self._signal = number
        self.bar.write(f"{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C: stop at once)")

    def _report_non_finite(self, error: NonFinite) -> str:
        path = self.folder / "non_finite.json"
        rows = sorted({row for rank in self.mesh.collect(error.rows) for row in rank})
        self.write_json(path.name, {"step": error.step + 1, "quantity": error.quantity, "rows": rows})
        what = "No weight was changed by that step"
        if error.changed:
            what = f"Weights with finite gradients were changed: {checkpoints.what_stays(self._checkpoint_folder)}"
        return (
            f"the {error.quantity} of step {error.step + 1} is not finite; the data rows of that step are in {path}. "
            f"Look at them with `burnish data preview`, or lower optim.lr. {what}"
        )

    def _tell_taking(self) -> None:
        """Say once that steps do not go the ordinary way."""
        taken = [own for own in self.learners if own.taking is not None and own.taking.wanted]
        if taken and not self._told_taking and self.mesh.is_main:
            self.bar.write(told_taking(any(own.clip > 0 for own in taken)))
        self._told_taking |= bool(taken)

    def _tell_shortage(self, shortage: Shortage) -> None:
        if self.mesh.is_main:
            self.bar.write(told(self.step + 1, shortage, self.config.data.max_length))


def _in_step(error: BaseException) -> bool:
    return isinstance(error, NoRoom) and error.in_step


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
