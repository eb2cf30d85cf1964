"""What a comparison would take, before it runs: models and their bytes, forwards, judge calls, time.

Every reply is taken to have its full length, so the figures are upper bounds; the time is a lower bound for that work:
weights are read once for each step of a batch, and a forward takes two operations per parameter and position, at the
bandwidth and the speed of products that this machine shows when asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console, Group, RenderableType
from rich.table import Table
from safetensors import safe_open

from genarm.lab.bench.timing import clock, copy_bandwidth
from genarm.lab.evaluation.comparing import calls
from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.judges.comparing import Calls
from genarm.lab.methods.interface import MethodSpec
from genarm.lab.methods.kinds import METHODS
from genarm.lab.methods.models import Models
from genarm.model.references import find_device


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Bytes per second that weights can be read at, and operations per second of large products."""

    bandwidth: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model by its name in the recipe; `parameters` is None where nothing tells."""

    reference: str
    parameters: float | None


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """Forwards of single rows for all prompts by model, and the seconds that they take at least, if known."""

    name: str
    forwards: Mapping[str, float]
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it."""

    title: str
    prompts: int
    models: tuple[ModelPlan, ...]
    trained: tuple[str, ...]
    methods: tuple[MethodPlan, ...]
    judges: tuple[Calls, ...]
    bytes_per_parameter: int

    @property
    def seconds(self) -> float:
        """Of all methods whose models are known."""
        return sum(method.seconds or 0.0 for method in self.methods)


def make_plan(recipe: Recipe, models: Models, console: Console) -> Plan:
    """Look at the models and at this machine; nothing is downloaded, trained or answered."""
    sizes = {name: _parameters(name, recipe, models) for name in _references(recipe)}
    device = find_device(None if models.device == "auto" else models.device)
    width = 4 if models.dtype == "float32" or device == "cpu" else 2
    console.print(f"measuring {device} …", highlight=False)
    speed = measure_speed(device, torch.float32 if width == 4 else torch.bfloat16)
    return Plan(
        title=f"{recipe.title} ({recipe.scale})",
        prompts=recipe.prompts.count,
        models=tuple(ModelPlan(reference=name, parameters=size) for name, size in sizes.items()),
        trained=tuple(_training(spec.name, spec.settings) for spec in recipe.train),
        methods=tuple(_method(spec, recipe, sizes, speed, width) for spec in recipe.methods),
        judges=calls(recipe),
        bytes_per_parameter=width,
    )


# --- work ------------------------------------------------------------------------------------------------------


def _method(
    spec: MethodSpec, recipe: Recipe, sizes: Mapping[str, float | None], speed: Speed, width: int
) -> MethodPlan:
    draw = recipe.draw(spec)
    per_reply = METHODS[spec.kind].forwards(spec, draw.max_new_tokens)
    forwards = {name: count * recipe.prompts.count for name, count in per_reply.items()}
    rows = min(draw.batch_size, recipe.prompts.count)
    seconds = 0.0
    for name, count in forwards.items():
        size = sizes.get(name.removeprefix("soup on "))
        if size is None:
            return MethodPlan(name=spec.name, forwards=forwards, seconds=None)
        seconds += max(count / rows * size * width / speed.bandwidth, 2 * size * count / speed.operations)
    return MethodPlan(name=spec.name, forwards=forwards, seconds=seconds)


def measure_speed(device: str, dtype: torch.dtype) -> Speed:
    """By copies of 256 MiB, and by the product of two square matrices: the best of a few tries each."""
    place = torch.device(device)
    matrix = torch.ones(2048, 2048, dtype=dtype, device=place)
    times = []
    for _ in range(4):
        begun = clock(place)
        _ = matrix @ matrix
        times.append(clock(place) - begun)
    return Speed(bandwidth=copy_bandwidth(place, size=2**28), operations=2 * 2048**3 / min(times))


# --- sizes -----------------------------------------------------------------------------------------------------


def _references(recipe: Recipe) -> list[str]:
    found = [name for spec in recipe.methods for name in spec.models]
    found += [str(spec.settings["model"]) for spec in recipe.train if "model" in spec.settings]
    return list(dict.fromkeys(found))


def _parameters(reference: str, recipe: Recipe, models: Models) -> float | None:
    """From the files, the recipe, or the hub; a model that the run trains counts as the one that it starts from."""
    trained = next((spec for spec in recipe.train if reference == f"@train/{spec.name}"), None)
    where = Path(models.resolve(reference))
    if where.is_dir() and any(where.glob("model*.safetensors")):
        return sum(_count(file) for file in where.glob("model*.safetensors"))
    if trained is not None:
        return _parameters(str(trained.settings["model"]), recipe, models)
    if reference in recipe.sizes:
        return recipe.sizes[reference]
    if reference.startswith("@"):
        return None  # the world's own, not yet made
    try:
        found = HfApi().model_info(reference.partition("@")[0]).safetensors
    except (HfHubHTTPError, OSError):
        return None
    return None if found is None else float(found.total)


def _count(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no mapping)
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _training(name: str, settings: Mapping[str, object]) -> str:
    how = "LoRA" if settings.get("lora") else "all weights"
    length = f"{settings['max_steps']} steps" if "max_steps" in settings else f"{settings.get('epochs', 1)} epoch(s)"
    what, data = settings.get("loss", settings.get("kind", "arm")), settings.get("data", settings.get("prompts"))
    return f"{name}: {what} from {settings['model']}, {how}, {length} of {data}"


# --- show ------------------------------------------------------------------------------------------------------


def show(plan: Plan) -> RenderableType:
    """The plan for a terminal."""
    models = Table("model", "parameters", "bytes", title="Models", title_justify="left")
    for model in plan.models:
        size = model.parameters
        known = (
            ("unknown", "unknown") if size is None else (_amount(size), _amount(size * plan.bytes_per_parameter) + "B")
        )
        models.add_row(model.reference, *known)
    work = Table("method", "forwards (rows), at most", "time, at least", title="Answers", title_justify="left")
    for method in plan.methods:
        parts = ", ".join(f"{_amount(count)} × {name}" for name, count in method.forwards.items())
        work.add_row(method.name, parts, "unknown" if method.seconds is None else _duration(method.seconds))
    judges = Table("judge", "calls", "tokens", "price", title="Judges", title_justify="left")
    for call in plan.judges:
        price = "–" if call.price is None else f"{call.price:.2f}"
        judges.add_row(call.judge, f"{call.calls:,}", _amount(call.tokens) if call.tokens else "–", price)
    lines = [
        f"{plan.title}: {plan.prompts} prompts, {len(plan.methods)} methods",
        *(f"train {t}" for t in plan.trained),
    ]
    total = _total(plan)
    return Group(*lines, models, work, judges, total)


def _amount(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _total(plan: Plan) -> str:
    known = [method for method in plan.methods if method.seconds is not None]
    if not known:
        return "how long decoding takes is not known before its models are there"
    some = "" if len(known) == len(plan.methods) else f" for the {len(known)} methods whose models are known"
    time = _duration(plan.seconds)
    least = time if plan.seconds < 1 else f"{time} at least"
    return f"decoding takes {least}{some}, training and loading not counted"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
