"""A run: its folder, its metrics, its checkpoints, and how it stops and goes on."""

import json
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from tqdm import tqdm

from burnish.config import SaveSettings
from burnish.engine import checkpoints
from burnish.engine.environment import environment
from burnish.engine.learner import Learner, NonFinite
from burnish.engine.memory import Peak, in_use, measured_peak
from burnish.engine.mesh import laid_like, whole
from burnish.engine.trackers import Tracker, open_trackers
from burnish.optim.adamw import optimizer_tensors, restore_optimizer


class Stopped(Exception):
    """The run was asked to stop and has saved itself; the message says how to go on."""


class Run:
    """A run in progress. Use it as a context manager, walk `steps`, and `log` what each step gave.

    The folder holds config.yaml, environment.json, metrics.jsonl (a line a step), checkpoints/step-N/, what trackers
    write, and in the end the result. A run continued from a checkpoint gives the weights, optimizer state, counters and
    metrics that the uninterrupted one would have given, bit for bit on the same machine; only times differ.
    """

    def __init__(
        self, folder: str, config_yaml: str, save: SaveSettings, learner: Learner, model: nn.Module, total_steps: int
    ) -> None:
        self.folder, self.save, self.learner, self.total_steps = Path(folder), save, learner, total_steps
        self.config_yaml, self.model, self.mesh = config_yaml, model, learner.mesh
        self.step, self.num_tokens, self.seconds, self.peak_bytes = 0, 0.0, 0.0, 0
        self.eval_loss: float | None = None
        self.trackers: list[Tracker] = []
        self._signal: int | None = None
        self._saved_step: int | None = None
        self._steps_here = 0
        self._step_began = time.perf_counter()
        self._measuring = ExitStack()

    def __enter__(self) -> Self:
        if self.mesh.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
            except OSError as error:
                raise OSError(f"run.folder={self.folder} cannot be written: {error.strerror}") from None
            place = json.dumps(environment(self.mesh.device, self.mesh.world), indent=2)
            (self.folder / "environment.json").write_text(place + "\n", encoding="utf-8")
        if self.save.resume:
            self._restore()
        if self.mesh.is_main:
            self.metrics_file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            self.trackers = open_trackers(self.save.trackers, self.folder, self.config_yaml, self.step)
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not self.mesh.is_main)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if self.mesh.is_main:
            self.metrics_file.close()
        if isinstance(error, NonFinite):
            raise ValueError(self._report_non_finite(error)) from None
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(self._report_out_of_memory()) from None

    def steps(self) -> Iterator[int]:
        """The steps still to take, counted from 0; saves a checkpoint when one is due and when asked to stop.

        Raises Stopped after SIGTERM or Ctrl-C, once the step under way is done and saved.
        """
        while self.step < self.total_steps:
            self._step_began = time.perf_counter()
            peak = self._measuring.enter_context(self._measured())
            yield self.step
            self._measuring.close()
            self.peak_bytes = max(self.peak_bytes, peak.bytes)
            self.step += 1
            self.bar.update()
            last = self.step == self.total_steps
            if last or self._signal is not None or (self.save.every and self.step % self.save.every == 0):
                self.checkpoint()
            if self._signal is not None and not last:
                raise Stopped(
                    f"stopped by {signal.Signals(self._signal).name} and saved at step {self.step} of "
                    f"{self.total_steps}; go on with the same command and save.resume=true"
                )

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the step under way, as the learner gave them; what follows is not part of the step."""
        took = time.perf_counter() - self._step_began
        self._measuring.close()
        self.seconds += took
        self.num_tokens += metrics["tokens"]
        if self.step % self.save.log_every == 0:
            rate, memory = metrics["tokens"] / took, in_use(self.mesh.device)
            self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {rate:,.0f} tok/s, {memory / 2**30:.2f} GiB")
            resources = {"tokens_per_second": rate, "memory_bytes": memory, "seconds": self.seconds}
            self._write({**metrics, "num_tokens": self.num_tokens, **resources})

    def log_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Record what an evaluation after the step under way gave; `eval_loss` decides which checkpoint is the best."""
        self.eval_loss = metrics.get("eval_loss", self.eval_loss)
        self._write(metrics)

    def _write(self, metrics: Mapping[str, float]) -> None:
        if self.mesh.is_main:
            self.metrics_file.write(json.dumps({"step": self.step + 1, **metrics}) + "\n")
            self.metrics_file.flush()
        for tracker in self.trackers:
            tracker.log(self.step + 1, metrics)

    def checkpoint(self) -> None:
        """Save everything that continuing needs. Every rank calls it; the main one writes."""
        if self._saved_step == self.step:
            return
        weights = {name: whole(p.detach()) for name, p in self.learner.parameters.items()}
        named = optimizer_tensors(self.learner.optimizer, self.learner.parameters)
        optimizer = {name: whole(tensor) for name, tensor in named.items()}
        if self.mesh.is_main:
            tensors = {"weights": weights, "optimizer": optimizer, "random": checkpoints.random_state(self.mesh.device)}
            state = {
                "step": self.step,
                "num_tokens": self.num_tokens,
                "seconds": self.seconds,
                "peak_bytes": self.peak_bytes,
                "eval_loss": self.eval_loss,
                "metrics_bytes": self.metrics_file.tell(),
            }
            checkpoints.save_checkpoint(self._checkpoint_folder / f"step-{self.step:08d}", tensors, state)
            checkpoints.prune(self._checkpoint_folder, self.save.keep)
        self._saved_step = self.step
        self.mesh.wait()

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, kept in the folder as name.json, so that a continued run does not do it again."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        self.bar.set_description(f"measuring {name} training")
        value = work()
        self.bar.set_description("training")
        self.write_json(path.name, value)
        self.mesh.wait()
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the folder, whole or not at all."""
        if self.mesh.is_main:
            aside = self.folder / f".{name}"
            aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.replace(self.folder / name)

    @contextmanager
    def _measured(self) -> Generator[Peak]:
        """The peak memory of a step: each on CUDA; on the CPU, where counting is slow, this process's second."""
        device = self.mesh.device
        self._steps_here += 1
        if device.type == "cuda" or self._steps_here == min(2, self.total_steps):
            states = optimizer_tensors(self.learner.optimizer, self.learner.parameters).values()
            held = [*self.model.parameters(), *self.model.buffers(), *states]
            with measured_peak(device, held) as peak:
                yield peak
        else:
            yield Peak()

    @property
    def _checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    def _restore(self) -> None:
        newest = checkpoints.newest_checkpoint(self._checkpoint_folder)
        if newest is None:  # stopped before its first checkpoint: it goes on from the beginning
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        tensors, state = checkpoints.load_checkpoint(newest)
        for name, parameter in self.learner.parameters.items():
            parameter.data.copy_(laid_like(tensors["weights"][name], parameter.data))
        optimizer = {
            name: laid_like(tensor, self.learner.parameters[name.rsplit(".", 1)[0]].data) if tensor.ndim else tensor
            for name, tensor in tensors["optimizer"].items()
        }
        restore_optimizer(self.learner.optimizer, self.learner.parameters, optimizer)
        checkpoints.restore_random_state(tensors["random"], self.mesh.device)
        self.step = self.learner.steps_taken = self._saved_step = state["step"]
        self.num_tokens = state["num_tokens"]
        self.eval_loss, self.seconds, self.peak_bytes = state["eval_loss"], state["seconds"], state["peak_bytes"]
        if self.mesh.is_main:  # lines of steps after the checkpoint are about to be written again
            with (self.folder / "metrics.jsonl").open("r+b") as file:
                file.truncate(state["metrics_bytes"])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: stop at once; job schedulers send SIGTERM twice and mean once
        self._signal = number
        self.bar.write(f"{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C: stop at once)")

    def _report_non_finite(self, error: NonFinite) -> str:
        record = {"step": error.step + 1, "quantity": error.quantity, "rows": error.rows}
        path = self.folder / "non_finite.json"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        return (
            f"the {error.quantity} of step {error.step + 1} is not finite; the data rows of that step are in {path}. "
            "Look at them with `burnish data preview`, or lower optim.lr. No weight was changed by that step"
        )

    def _report_out_of_memory(self) -> str:
        held = in_use(self.mesh.device) / 2**30
        return (
            f"out of memory at step {self.step + 1} with {held:.1f} GiB in use on {self.mesh.device}; any of these "
            "needs less: half of run.microbatch_tokens, run.checkpointing=true, model.storage=nf4, a smaller "
            "data.max_length"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
