"""The optimiser's loop of the toy world's training, with a state on disk from which it continues bit for bit."""

import io
import json
import pickle
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memflow_ops.files import write_atomically
from memflow_ops.model.toy.losses import draw_batch, training_losses
from memflow_ops.model.toy.schedule import TOY_CONFIG, TrainingSettings, TrainingStage, learning_rate_factor
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CURVE_INTERVAL = 50
"""Steps between two points of the loss curve."""
UNUSABLE = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""The errors that arise where a file holds something else than what `Trainer.save` writes."""


class MovingAverage:
    """An exponential moving average of a model's weights. Its decay grows with the steps, so that it forgets the
    beginning quickly."""

    def __init__(self, model: CausalVideoModel):
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: CausalVideoModel, step: int) -> None:
        decay = min(0.99, step / (step + 20))
        torch._foreach_lerp_(list(self.weights.values()), list(model.state_dict().values()), 1 - decay)


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands after a step. The losses are running means over about 50 steps."""

    step: int
    total: int
    stage: TrainingStage
    denoising: float
    relevance: float


class Trainer:
    """A training run that can be stopped after any step and continued bit for bit, also in another process."""

    def __init__(
        self, settings: TrainingSettings, config: ModelConfig = TOY_CONFIG, device: str | torch.device = "cpu"
    ):
        self.settings, self.device = settings, torch.device(device)
        self.total = sum(stage.steps for stage in settings.stages)
        self.generator = torch.Generator(device="cpu").manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the layers' own initialisation draws from the global generator
            self.model = CausalVideoModel(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = MovingAverage(self.model)
        self.steps_done = 0
        self.seconds = 0.0
        self.running: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        """The running means of the losses, a point every CURVE_INTERVAL steps."""

    @property
    def stage(self) -> TrainingStage:
        """The stage of the coming step; at the end the last one."""
        left = self.steps_done
        for stage in self.settings.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        return self.settings.stages[-1]

    def step(self) -> TrainingProgress:
        """Takes one step of the optimiser. A loss that is not finite raises a ValueError."""
        started, stage = time.perf_counter(), self.stage
        for group in self.optimizer.param_groups:
            factor = learning_rate_factor(self.steps_done / self.total, self.steps_done)
            group["lr"] = self.settings.learning_rate * factor
        batch = draw_batch(stage.batch, stage.size, self.generator)
        losses = training_losses(self.model, batch, stage, self.settings, self.generator)
        if not losses.total.isfinite():
            raise ValueError(f"the loss of step {self.steps_done + 1} is not finite; begin anew with --restart")
        self.optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.model, self.steps_done)
        self.steps_done += 1
        for name, value in (("denoising", losses.denoising.item()), ("relevance", losses.relevance.item())):
            self.running[name] = 0.98 * self.running.get(name, value) + 0.02 * value
        if self.steps_done % CURVE_INTERVAL == 0 or self.steps_done == self.total:
            point = {"step": self.steps_done, "size": stage.size}
            self.curve.append(point | {name: round(value, 5) for name, value in self.running.items()})
        self.seconds += time.perf_counter() - started
        return TrainingProgress(
            self.steps_done, self.total, stage, self.running["denoising"], self.running["relevance"]
        )

    def averaged_model(self) -> CausalVideoModel:
        """A new model in eval mode with the averaged weights."""
        model = CausalVideoModel(self.model.config).to(self.device)
        model.load_state_dict(self.average.weights)
        return model.eval()

    def machine(self) -> str:
        """What rounding depends on beside the settings: device, threads and the version of torch, in words."""
        return f"{self.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def save(self, path: Path) -> None:
        """Writes everything that `load` needs, atomically."""
        state = {
            "settings": json.dumps(asdict(self.settings)),
            "config": json.dumps(asdict(self.model.config)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "generator": self.generator.get_state(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "running": self.running,
            "curve": self.curve,
            "machine": self.machine(),
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, content.getvalue())

    def load(self, path: Path) -> str:
        """Continues where `save` stopped, and returns the `machine` that the state was saved on.

        On another machine the run continues, but not bit for bit. A ValueError says that the file is damaged, or that
        its run had other settings or another model.
        """
        state = _read_state(path, self.device)
        _check_same(path, "settings", state["settings"], asdict(self.settings))
        _check_same(path, "model", state["config"], asdict(self.model.config))
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.weights = state["average"]
            self.generator.set_state(state["generator"].cpu())
            self.steps_done, self.seconds = state["steps_done"], state["seconds"]
            self.running, self.curve = state["running"], state["curve"]
            return str(state["machine"])
        except UNUSABLE as error:
            raise ValueError(f"{path} is damaged; delete it, or begin anew with --restart") from error


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a state file, its settings and config parsed; a ValueError for a file that is none."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state | {name: json.loads(state[name]) for name in ("settings", "config")}
    except (pickle.UnpicklingError, zipfile.BadZipFile, *UNUSABLE, EOFError, OSError) as error:
        raise ValueError(f"{path} is no training state of ours; delete it, or begin anew with --restart") from error


def _check_same(path: Path, name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ValueError that names the entries which differ. `then` has been through JSON, `now` has not."""
    now = json.loads(json.dumps(now))
    if then != now:
        differing = [key for key in now if then.get(key) != now[key]]
        raise ValueError(
            f"{path} was written by a run with another {name}: {', '.join(differing)} differ; "
            "give the same options, or begin anew with --restart"
        )
