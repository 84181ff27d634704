"""Reads and checks a fixture of `memflow_ops.model.replay`: a safetensors file and its JSON.

Every size comes from the JSON and is checked against the tensors before anything runs. The latents' height and width
are those of which a token grid, the sampled outputs and the recorded noise all agree.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.checkpoints.native import check_state_dict
from memflow_ops.model.replay.files import Description, FixtureError, Tensors
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

MODES = ("dense", "sma")
NOISE_TOLERANCE = 1e-5
"""torch draws the same noise on every machine, up to the last bits of a logarithm."""


@dataclass(frozen=True)
class Call:
    """One recorded pass of the model."""

    mode: str
    chunk: int
    step: int
    timestep: float
    out: Tensor
    """A sample of the output y (1, C, F, H, W): y[0, :, :, ::6, ::8]."""
    mean: float
    std: float
    """Mean and standard deviation of all of y."""
    kept: list[list[int]] | None
    """Per layer the places of the bank whose frames stay, best first; None if the bank drops no frame."""
    activated: list[list[list[int]]]
    """Per layer and head the candidates that are attended to, best first; empty without sparse activation."""


class Fixture:
    """The sizes and tensors of a fixture. A FixtureError for whatever is missing, malformed or contradictory."""

    def __init__(self, tensors: Path, description: Path):
        self._json, self._tensors = Description(description), Tensors(tensors)

        self.frames_per_chunk = self._json.whole("frames_per_chunk", 1, default=3)
        self.tokens_per_frame = self._json.whole("tokens_per_frame", 1)
        self.noise_seed = self._json.whole("noise_seed", 0, most=2**63 - 1)
        self.switch_chunk = self._json.whole("switch_chunk", -1, default=-1)
        self.timesteps = [
            self._json.number(f"timesteps[{i}]", t) for i, t in enumerate(self._json.entries("timesteps"))
        ]
        self.sink_size = self._json.whole("sink_size", 0, default=3)
        self.bank_size = self._json.whole("bank_size", 0, default=3)
        self.record_interval = self._json.whole("record_interval", 1, default=3)
        self.window_size = self._json.whole("local_attn_size", 1, default=12) - self.sink_size
        if self.window_size < self.frames_per_chunk:
            raise self._json.error(
                f"local_attn_size must leave the local window at least a chunk of {self.frames_per_chunk} frames "
                f"beside sink_size={self.sink_size}, got {self.window_size + self.sink_size}"
            )
        self._config = self._model_config()
        self._calls = {mode: self._read_calls(mode) for mode in MODES if self._json.has(mode)}
        if not any(self._calls.values()):
            raise self._json.error("there is nothing to replay: expected recorded calls under 'dense' or 'sma'")
        self.top_frames = self._top_frames()
        self.context = self._context("context")
        if len(self.context[0]) != self._json.whole("text_tokens", 0, default=len(self.context[0])):
            raise self._json.error(
                f"text_tokens is {self._json.value('text_tokens')}, but context has {len(self.context[0])} rows"
            )
        self.context_after_switch = self._context("context_after_switch") if self.switch_chunk >= 0 else self.context
        self.grid = self._find_grid()

    @property
    def modes(self) -> list[str]:
        """Those of `MODES` that were recorded."""
        return [mode for mode, calls in self._calls.items() if calls]

    def chunks(self, mode: str) -> int:
        """How many chunks were recorded in a mode."""
        return len(self._calls[mode])

    def compresses(self, chunk: int) -> bool:
        """Whether the bank drops a frame before this chunk."""
        return chunk >= 1 and self.bank_size > 0 and (chunk - 1) // self.record_interval >= self.bank_size

    def call(self, mode: str, chunk: int, step: int) -> Call:
        """One recorded call, its output read from the file."""
        entry, where = self._calls[mode][chunk][step], f"{mode}, chunk {chunk}, step {step}"
        kept, activated = self._choices(entry, mode, chunk, step, where)
        return Call(
            mode,
            chunk,
            step,
            self.timesteps[step],
            self._tensors.tensor(self._out_name(entry, mode, chunk, step), self._out_shape(*self._pixels(self.grid))),
            self._json.number(f"{where}: y_mean", entry.get("y_mean")),
            self._json.number(f"{where}: y_std", entry.get("y_std")),
            kept,
            activated,
        )

    @cached_property
    def model(self) -> CausalVideoModel:
        """The model with the fixture's weights, float32."""
        prefix = "weights."
        weights = {
            name.removeprefix(prefix): self._tensors.tensor(name).float()
            for name in self._tensors.names
            if name.startswith(prefix)
        }
        with torch.device("meta"):
            model = CausalVideoModel(self._config)
        try:
            check_state_dict(model, weights, f"{self._tensors.path}: {prefix}*")
        except ValueError as error:
            raise FixtureError(str(error)) from error
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def noise(self) -> Iterator[Tensor]:
        """The noise (1, C, F, H, W) of each chunk, drawn as for the recording and compared with its sample."""
        return self._draw(self.grid)

    # ---------------------------------------------------------------------------------------------- the latents' size

    def _pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        _, height, width = self._config.patch_size
        return grid[0] * height, grid[1] * width

    def _out_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self._config.out_dim, self.frames_per_chunk, -(-height // 6), -(-width // 8))

    def _noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (min(2, self._config.in_dim), self.frames_per_chunk, -(-height // 20), -(-width // 26))

    def _find_grid(self) -> tuple[int, int]:
        """The rows and columns of tokens with which the shapes of the recorded outputs and noise agree."""
        tokens = self.tokens_per_frame
        mode = self.modes[0]
        out = self._tensors.shape(self._out_name(self._calls[mode][0][0], mode, 0, 0))
        sample = self._tensors.shape("noise_check.00")
        rows = [n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0]
        grids = [(n, tokens // n) for n in sorted({*rows, *(tokens // n for n in rows)})]
        fitting = [
            grid
            for grid in grids
            if (self._out_shape(*self._pixels(grid)), self._noise_shape(*self._pixels(grid))) == (out, sample)
        ]
        if not fitting:
            raise FixtureError(
                f"{self._tensors.path}: no grid of tokens_per_frame={tokens} tokens gives outputs of shape {out} "
                f"(every 6th row and 8th column) and noise samples of shape {sample} (every 20th and 26th)"
            )
        for grid in fitting[:-1]:  # if several grids fit, the noise tells which one it was
            try:
                next(self._draw(grid))
            except FixtureError:
                continue
            return grid
        next(self._draw(fitting[-1]))
        return fitting[-1]

    def _draw(self, grid: tuple[int, int]) -> Iterator[Tensor]:
        config, (height, width) = self._config, self._pixels(grid)
        generator = torch.Generator(device="cpu").manual_seed(self.noise_seed)
        shape = (1, config.in_dim, self.frames_per_chunk, height, width)
        # The recording drew `context` before the noise.
        torch.randn(self.context.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        for chunk in range(max(map(len, self._calls.values()))):
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            name = f"noise_check.{chunk:02d}"
            recorded = self._tensors.tensor(name, self._noise_shape(height, width))
            difference = (noise[0, :2, :, ::20, ::26] - recorded).abs().max().item()
            if not difference <= NOISE_TOLERANCE:
                raise FixtureError(
                    f"{self._tensors.path}: {name} differs by {difference:.2g} from the noise that noise_seed="
                    f"{self.noise_seed} gives here, so the inputs of the recording cannot be made"
                )
            yield noise

    # ------------------------------------------------------------------------------------------------- the JSON's parts

    def _model_config(self) -> ModelConfig:
        kind = self._json.value("model_type", "t2v")
        if kind != "t2v":
            raise self._json.error(f"model_type must be 't2v', got {kind!r}")
        names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim")
        sizes: dict[str, Any] = {name: self._json.whole(name, 1) for name in names}
        patch = self._json.value("patch_size", [1, 2, 2])
        if not isinstance(patch, list) or not all(type(n) is int and n > 0 for n in patch):
            raise self._json.error(f"patch_size must be three positive whole numbers, got {patch!r}")
        if sizes["in_dim"] != sizes["out_dim"]:
            raise self._json.error(f"in_dim must equal out_dim, got {sizes['in_dim']} and {sizes['out_dim']}")
        blocks = {name.split(".")[2] for name in self._tensors.names if name.startswith("weights.blocks.")}
        if len(blocks) != sizes["num_layers"]:  # checked before a model of that many layers is built
            raise self._json.error(f"num_layers is {sizes['num_layers']}, but the weights have {len(blocks)} blocks")
        try:
            return ModelConfig(
                **sizes, patch_size=tuple(patch), eps=self._json.number("eps", self._json.value("eps", 1e-6))
            )
        except ValueError as error:
            raise self._json.error(str(error)) from error

    def _read_calls(self, mode: str) -> list[list[dict[str, Any]]]:
        """Per chunk the entry of every step. None may be missing or double, and every tensor must be there."""
        table: dict[tuple[int, int], dict[str, Any]] = {}
        for i, entry in enumerate(self._json.entries(mode, may_be_empty=True)):
            if not isinstance(entry, dict):
                raise self._json.error(f"{mode}[{i}] must be an object, got {entry!r}")
            chunk, step = (
                self._json.check_whole(f"{mode}[{i}].{name}", entry.get(name), 0) for name in ("chunk", "step")
            )
            if step >= len(self.timesteps):
                raise self._json.error(f"{mode}[{i}]: step {step} has no place among {len(self.timesteps)} timesteps")
            timestep = self._json.number(f"{mode}[{i}].timestep", entry.get("timestep", self.timesteps[step]))
            if timestep != self.timesteps[step]:
                raise self._json.error(
                    f"{mode}[{i}]: timestep is {timestep}, but timesteps[{step}] {self.timesteps[step]}"
                )
            if (chunk, step) in table:
                raise self._json.error(f"{mode}: chunk {chunk}, step {step} is there twice")
            table[chunk, step] = entry
        if not table:
            return []
        chunks = 1 + max(chunk for chunk, _ in table)
        if len(table) != chunks * len(self.timesteps):
            some = range(len(table) + 1)  # one of these is missing
            missing = next((c, s) for c in some for s in range(len(self.timesteps)) if (c, s) not in table)
            raise self._json.error(f"{mode}: chunk {missing[0]}, step {missing[1]} is missing")
        calls = [[table[chunk, step] for step in range(len(self.timesteps))] for chunk in range(chunks)]
        for chunk, steps in enumerate(calls):
            self._tensors.need(f"noise_check.{chunk:02d}")
            for step, entry in enumerate(steps):
                self._tensors.need(self._out_name(entry, mode, chunk, step))
                self._choices(entry, mode, chunk, step, f"{mode}, chunk {chunk}, step {step}")
        return calls

    def _out_name(self, entry: dict[str, Any], mode: str, chunk: int, step: int) -> str:
        return str(entry.get("out", f"{mode}.out.{chunk:02d}.{step}"))

    def _choices(
        self, entry: dict[str, Any], mode: str, chunk: int, step: int, where: str
    ) -> tuple[list[list[int]] | None, list[list[list[int]]]]:
        """The top-k choices of a call: what the bank keeps, and what every layer and head attends to."""
        layers, heads = self._config.num_layers, self._config.num_heads
        found = entry.get("topk", [])
        compresses = step == 0 and self.compresses(chunk)
        if compresses and self.bank_size == 1 and isinstance(found, list) and len(found) == layers * (mode == "sma"):
            found = [[[]]] * layers + found  # a choice among no frames may be left out
        expected = layers * (compresses + (mode == "sma"))
        if not isinstance(found, list) or len(found) != expected:
            got = len(found) if isinstance(found, list) else repr(found)
            raise self._json.error(f"{where}: topk must hold {expected} choices, got {got}")
        kept = None
        if compresses:
            kept = [self._indices(where, of, 1, self.bank_size, length=self.bank_size - 1)[0] for of in found[:layers]]
        candidates = min(self.sink_size, (chunk + 1) * self.frames_per_chunk)
        candidates += min(self.bank_size, (chunk + self.record_interval - 1) // self.record_interval)
        activated = [self._indices(where, of, heads, candidates) for of in found[layers * compresses :]]
        return kept, activated

    def _indices(self, where: str, choice: Any, rows: int, below: int, length: int | None = None) -> list[list[int]]:
        """Checks a choice of shape (1, length) or (1, rows, any) and returns its rows of different numbers from 0 to
        below - 1."""
        nested: Any = choice[0] if isinstance(choice, list) and len(choice) == 1 else None
        if length is not None:
            nested = [nested]

        def is_choice(row: Any) -> bool:
            if not isinstance(row, list) or (length is not None and len(row) != length):
                return False
            return all(type(i) is int and 0 <= i < below for i in row) and len(set(row)) == len(row)

        good = isinstance(nested, list) and len(nested) == rows and all(map(is_choice, nested))
        if not good:
            shape = f"(1, {length})" if length is not None else f"(1, {rows}, frames)"
            raise self._json.error(
                f"{where}: a choice must have shape {shape} and different entries from 0 to {below - 1}, got {choice!r}"
            )
        return nested

    def _top_frames(self) -> int:
        """How many frames sparse activation attends to: as many as any recorded choice has."""
        choices = [
            head
            for chunk, steps in enumerate(self._calls.get("sma", []))
            for step, entry in enumerate(steps)
            for layer in self._choices(entry, "sma", chunk, step, "")[1]
            for head in layer
        ]
        return max([1, *map(len, choices)]) if choices else 3

    def _context(self, name: str) -> Tensor:
        """Text embeddings (1, tokens, text_dim) float32."""
        context = self._tensors.tensor(name)
        config = self._config
        if context.dim() != 2 or context.shape[0] > config.text_len or context.shape[1] != config.text_dim:
            raise FixtureError(
                f"{self._tensors.path}: {name} must be (up to {config.text_len}, {config.text_dim}), "
                f"got {tuple(context.shape)}"
            )
        return context[None]
