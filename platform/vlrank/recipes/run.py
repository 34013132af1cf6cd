"""``vlrank run``: the stages of a recipe one after the other, in one Ray session, with one summary at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from vlrank.config import Config, RayConfig
from vlrank.console import Summary, console, duration
from vlrank.data.tables import atomic_write_json, atomic_write_text, read_json
from vlrank.errors import UserError, user_error_in
from vlrank.options import check_out
from vlrank.recipes.recipe import RunConfig, Step, absolute_recipe, steps_of
from vlrank.retrieval.sequential.data import METHODS as SEQUENTIAL
from vlrank.runtime import ray_session
from vlrank.stages import STAGES, lazy
from vlrank.storage import Location, is_url

_TIMES = "times.json"
"""In the recipe's folder: name -> seconds spent in the stage, in all runs together."""


def run(config: RunConfig) -> Summary:
    """Run all stages; the folder keeps ``recipe.yaml``, as it was run, and the stages' times.

    Raises:
        UserError: what a stage raises, with the stage's name; a folder or file that a stage starts from is missing.
    """
    started = time.perf_counter()
    steps = steps_of(config)
    _check_inputs(steps)
    config.out.mkdir(parents=True, exist_ok=True)
    recipe = absolute_recipe(config, str(Path.cwd()))
    atomic_write_text(config.out / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    times: dict[str, float] = read_json(config.out / _TIMES) if (config.out / _TIMES).is_file() else {}

    lines: dict[str, object] = {}
    last = Summary("")
    with _one_session(steps):
        for number, step in enumerate(steps, 1):
            console.rule(Text(f"{number}/{len(steps)} {step.stage}: {step.name}", "bold"), align="left")
            begun = time.perf_counter()
            with _naming(step):
                check_out(step.config)
                last = lazy(STAGES[step.stage][1])(_with_times(step.config, times))
            last.show()
            seconds = time.perf_counter() - begun
            times[step.name] = round(times.get(step.name, 0.0) + seconds, 1)
            atomic_write_json(config.out / _TIMES, times)
            lines[f"{step.stage} {step.name}"] = duration(seconds)
            if last.failure:
                left = ", ".join(other.name for other in steps[number:]) or "nothing"
                failure = f"{step.title}: {last.failure}\nNot run: {left}."
                return Summary(f"run: {config.out}, stopped at {step.name}", lines, last.output, last.counts, failure)
    spent = time.perf_counter() - started
    earlier = f" ({duration(sum(times.values()))} in all runs)" if sum(times.values()) > spent + 1 else ""
    lines["total"] = duration(spent) + earlier
    return Summary(f"run: {config.out}", lines, last.output, last.counts)


def dry_run(config: RunConfig) -> Summary:
    """The whole plan: for each stage what it makes and what it says itself, as far as what it reads is there.

    Raises:
        UserError: what a stage would refuse.
    """
    steps = steps_of(config)
    _check_inputs(steps)
    times = read_json(config.out / _TIMES) if (config.out / _TIMES).is_file() else {}
    done: set[str] = set()
    lines: dict[str, object] = {}
    known = 0.0
    for number, step in enumerate(steps, 1):
        console.rule(Text(f"{number}/{len(steps)} {step.stage}: {step.name}", "bold"), align="left")
        waiting = [name for name in step.needs if name not in done]
        if waiting:
            facts = _given(step) | {"more is known after": ", ".join(waiting)}
            plan = Summary(f"{step.stage} (dry run)", facts, step.result)
        else:
            with _naming(step):
                plan = lazy(STAGES[step.stage][2] or "")(step.config)
        plan.show()
        pending = plan.counts.get("pending")  # what a bulk stage has left to do, also where its output is there
        made = not waiting and (step.done.is_file() and not pending if step.done is not None else pending == 0)
        if made:
            done.add(step.name)
        else:
            known += plan.counts.get("estimated_seconds", 0)
        lines[f"{step.stage} {step.name}"] = _state(step, made, waiting, plan, times)
    if len(done) < len(steps):
        lines["estimated"] = f"{duration(known)} for the stages that can say" if known else "no stage can say yet"
    if isinstance(config.out, Path):
        lines["disk"] = f"{_free_gb(config.out):,.1f} GB free at {config.out}"
    return Summary(f"run (dry run): {len(done)} of {len(steps)} stages done", lines, config.out)


def _state(step: Step, made: bool, waiting: Sequence[str], plan: Summary, times: dict[str, float]) -> str:
    state = "done" if made else f"after {', '.join(waiting)}" if waiting else "to do"
    if not made and (seconds := plan.counts.get("estimated_seconds")):
        state += f", about {duration(seconds)}"
    if step.name in times:
        state += f" ({duration(times[step.name])} so far)"
    return state


def _given(step: Step) -> dict[str, object]:
    """The settings that a recipe gives to a stage."""
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in step.settings.items()
    }


@contextmanager
def _naming(step: Step) -> Iterator[None]:
    """What the user can mend, with the name of the stage."""
    try:
        yield
    except Exception as error:
        found = user_error_in(error)
        if found is None:
            raise
        raise UserError(f"{step.title}: {found.problem}", found.remedy) from error


def _one_session(steps: Sequence[Step]) -> AbstractContextManager[None]:
    """One Ray for all stages, where they want the same and at least one needs it; else each stage starts its own."""
    wanted = [ray for step in steps if (ray := _ray_of(step.stage, step.config)) is not None]
    alike = bool(wanted) and all(one == wanted[0] for one in wanted)
    return ray_session(wanted[0]) if alike else nullcontext()


def _ray_of(stage: str, config: Any) -> RayConfig | None:
    """Where a stage works, if it works on Ray."""
    if stage == "prepare":
        on_ray = config.use_image and config.pictures.workers
    elif stage == "retrieve":
        on_ray = config.method in SEQUENTIAL
    else:
        on_ray = stage != "evaluate"
    return config.ray if on_ray else None


def _with_times(config: Config, times: dict[str, float]) -> Config:
    """A report shows what the stages before it took, unless it is told."""
    if "stage_times" in type(config).model_fields and "stage_times" not in config.model_fields_set:
        return config.model_copy(update={"stage_times": dict(times)})
    return config


def _check_inputs(steps: Sequence[Step]) -> None:
    """Find folders and files that are missing before the first stage runs.

    Raises:
        UserError: a path that a stage starts from does not exist.
    """
    for step in steps:
        for key in ("reviews", "meta", "dataset", "model", "scores_of", "rankings", "runs", "sweep"):
            for value in _several(step.settings.get(key)):
                local = "/" in value and not is_url(value)
                if local and (key != "model" or value.startswith((".", "/", "~"))) and not Path(value).exists():
                    raise UserError(f"{step.title}: `{key}` {value} does not exist", "Check the path.")


def _several(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]


def _free_gb(place: Location) -> float:
    folder = Path(str(place)).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9
