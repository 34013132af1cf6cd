"""``vlrank run``: a recipe is a YAML file of stages with their settings, in order, with names instead of paths.

The stages do the work. A recipe adds names, one output folder, and a check of the whole before anything runs. What a
stage makes is ``OUT/NAME``; rankings are ``OUT/NAME.parquet``, and lists ``candidates/NAME`` of their dataset. Every
stage does only what is missing, and so does a recipe that runs again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, model_validator

from vlrank.config import Config, PrepareConfig, ServeConfig, merge, validate, with_mode_defaults
from vlrank.errors import UserError
from vlrank.paths import absolute_paths
from vlrank.stages import STAGES, Stage
from vlrank.storage import ConfigLocation, Location, location

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SETTING = re.compile(r"\$\{(\w*)\}")
_MADE_BY = {
    "dataset": ("prepare",),
    "candidates": ("retrieve",),
    "method": ("retrieve",),  # ensemble:A,B
    "model": ("train", "tune"),
    "scores_of": ("rerank",),
    "rankings": ("rerank",),
    "runs": ("train",),
    "sweep": ("tune",),
}
"""Keys of stages that take names, and the stages whose names they take."""


class RunConfig(Config):
    """``vlrank run``: run the stages of a recipe, one after the other."""

    file_argument: ClassVar[str] = "RECIPE.yaml"
    verbatim = PrepareConfig.verbatim

    out: ConfigLocation = Field(..., description="Folder for everything that the recipe makes.")
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Values that stages write as ${NAME}. NAME=VALUE sets one; one without a value has to be set.",
    )
    common: dict[str, Any] = Field(
        default_factory=dict, description="Settings of all stages that have such a key, e.g. common.seed=1."
    )
    stages: tuple[dict[str, Any], ...] = Field(
        ..., min_length=1, description="`STAGE: NAME` and the stage's settings. NAME.KEY=VALUE replaces one."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_overrides(cls, values: Any) -> Any:
        """Bring ``NAME=VALUE`` of a setting and ``NAME: {KEY: VALUE}`` of a stage to their places."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), list | tuple):
            return values
        kept = {key: value for key, value in values.items() if key in cls.model_fields}
        entries = [dict(entry) if isinstance(entry, dict) else entry for entry in values["stages"]]
        whole = [entry for entry in entries if isinstance(entry, dict) and entry]
        named = {name_of(entry): entry for entry in whole if isinstance(name_of(entry), str)}
        settings = values.get("settings") or {}
        for key, value in values.items():
            if key in kept:
                continue
            if key in settings:
                kept["settings"] = {**(kept.get("settings") or {}), key: value}
            elif key in named and isinstance(value, dict):
                named[key].update(merge(named[key], value))
            elif key in named:
                raise ValueError(f"`{key}` is a stage: its settings are given as {key}.KEY=VALUE, got {key}={value}")
            else:
                known = [*cls.model_fields, *settings, *named]
                raise ValueError(f"unknown key `{key}`{_near(key, known)}; this recipe has {', '.join(known)}")
        return kept | {"stages": entries}

    @model_validator(mode="after")
    def _all_stages_are_valid(self) -> RunConfig:
        steps_of(self)
        return self


JOBS: dict[str, Stage] = {
    **STAGES,
    "run": (RunConfig, "vlrank.recipes.run:run", "vlrank.recipes.run:dry_run"),
    "serve": (ServeConfig, "vlrank.serving.run:run", "vlrank.serving.run:dry_run"),
}
"""What can run as a job: a stage, a recipe of stages, or the server."""


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a recipe.

    Attributes:
        stage: Key of `vlrank.stages.STAGES`.
        name: Its name in the recipe.
        settings: As the recipe gives them, with common ones, and with names.
        config: The stage's config, with paths in place of names.
        needs: Earlier steps whose results it reads.
        result: What it makes; of generation, the dataset that grows.
        done: Exists when the step is done; None where only the stage knows.
    """

    stage: str
    name: str
    settings: Mapping[str, Any]
    config: Config
    needs: tuple[str, ...]
    result: Location
    done: Location | None

    @property
    def title(self) -> str:
        """``stage `model` (train)``, for messages."""
        return _title(self.name, self.stage)


def steps_of(config: RunConfig) -> list[Step]:
    """The stages of a recipe, checked.

    Raises:
        UserError: no such stage, name, setting or key; a name that is used twice; a cycle; a wrong value.
    """
    entries = _entries(config)
    needs = _needs(entries)
    steps: list[Step] = []
    problems: list[UserError] = []
    for name, (stage, settings) in entries.items():
        places = {step.name: _place(config.out, step.stage, step.name) for step in steps}
        values = _with_places(settings, places) | _own_place(config.out, stage, name)
        try:
            checked = validate(STAGES[stage][0], with_mode_defaults(STAGES[stage][0], values))
        except UserError as error:
            lines = [f"{_title(name, stage)}: {line}" for line in error.problem.splitlines()]
            problems.append(UserError("\n".join(lines), error.remedy))
            continue
        steps.append(Step(stage, name, settings, checked, needs[name], *_result(config.out, stage, name, checked)))
    _raise_together(problems)
    return steps


def absolute_recipe(config: Config, workdir: str | None) -> dict[str, Any]:
    """`absolute_paths` of a stage's config or of a recipe, in which it goes through all stages.

    Raises:
        UserError: as `absolute_paths`.
    """
    values = absolute_paths(config, workdir)
    if not isinstance(config, RunConfig):
        return values
    stages = []
    for step in steps_of(config.model_copy(update={"out": location(values["out"])})):
        try:
            absolute = absolute_paths(step.config, workdir)
        except UserError as error:
            raise UserError(f"{step.title}: {error.problem}", error.remedy) from None
        names = set(step.needs)
        kept = {key: _names_kept(value, absolute[key], names) for key, value in step.settings.items()}
        if step.stage == "prepare" and "raw_dir" in absolute:
            kept["raw_dir"] = absolute["raw_dir"]
        stages.append({step.stage: step.name, **kept})
    return {"out": values["out"], "stages": stages}


def _names_kept(given: Any, absolute: Any, names: set[str]) -> Any:
    """The absolute value, but names stay names."""
    if isinstance(given, list | tuple) and isinstance(absolute, list):
        return [_names_kept(one, other, names) for one, other in zip(given, absolute, strict=True)]
    return given if isinstance(given, str) and given in names else absolute


# ---- names -----------------------------------------------------------------------------------------------------------


def _title(name: object, stage: str) -> str:
    return f"stage `{name}` ({stage})" if name != stage else f"stage `{stage}`"


def _near(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean `{near[0]}`?" if near else ""


def _stage_of(entry: Mapping[Any, Any]) -> Any:
    """The stage of ``{STAGE: NAME, ...}``; where there is none, the first key that is no setting either."""
    # A sweep has settings under `train`; keys that YAML merges into an entry stand before its own.
    found = [key for key, value in entry.items() if key in STAGES and not isinstance(value, Mapping)]
    known = {key for config_type, *_ in STAGES.values() for key in config_type.model_fields}
    return next(iter([*found, *(key for key in entry if key not in known), *entry]))


def name_of(entry: Mapping[Any, Any]) -> Any:
    """The name in ``{STAGE: NAME, ...}``; the stage itself where none is given."""
    stage = _stage_of(entry)
    return stage if entry[stage] is None else entry[stage]


def _entries(config: RunConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> stage and settings, with common ones and with the recipe's settings filled in."""
    entries: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, entry in enumerate(config.stages, 1):
        if not entry:
            raise UserError(f"stage {number} of the recipe is empty", "Write `- STAGE: NAME` and its settings.")
        stage, name = _stage_of(entry), name_of(entry)
        if stage not in STAGES:
            raise UserError(
                f"stage {number} of the recipe has `{stage}`, which is no stage{_near(stage, list(STAGES))}",
                f"A stage begins with `- STAGE: NAME`; stages are {', '.join(STAGES)}.",
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"stage {number} of the recipe ({stage}) cannot be named {name!r}",
                f"Write `- {stage}: NAME`, of letters, digits, '_' and '-', and the settings below it.",
            )
        if name in config.settings or name in RunConfig.model_fields:
            what = "a setting" if name in config.settings else "a key of every recipe"
            raise UserError(
                f"stage {number} of the recipe ({stage}) is named `{name}`, as {what}",
                "Choose another name: NAME=VALUE could mean both.",
            )
        if name in entries:
            raise UserError(
                f"the name `{name}` is used twice: by a {entries[name][0]} stage and by stage {number} ({stage})",
                "Names are given once, so that others can refer to them.",
            )
        own = {key: value for key, value in entry.items() if key != stage}
        for key in {"out", "name"} & own.keys():
            raise UserError(f"{_title(name, stage)} sets `{key}`, which its name decides", "Rename the stage instead.")
        keys = STAGES[stage][0].model_fields
        shared = {key: value for key, value in config.common.items() if key in keys}
        entries[name] = stage, _filled(merge(shared, own), config.settings, _title(name, stage))
    known = {key for config_type, *_ in STAGES.values() for key in config_type.model_fields}
    for key in config.common:
        if key not in known:
            raise UserError(f"`common` sets `{key}`, which no stage has{_near(key, sorted(known))}")
    return entries


def _filled(value: Any, settings: Mapping[str, Any], title: str) -> Any:
    """``value`` with ``${NAME}`` replaced, at any depth; a text that is nothing else keeps the setting's type."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, settings, title) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, settings, title) for inner in value]
    if not isinstance(value, str):
        return value

    def found(name: str) -> Any:
        if name not in settings:
            known = ", ".join(settings) or "none"
            raise UserError(f"{title} uses ${{{name}}}{_near(name, list(settings))}", f"`settings` has: {known}.")
        if settings[name] is None:
            raise UserError(f"the setting `{name}` has no value, and {title} needs it", f"Add {name}=VALUE.")
        return settings[name]

    whole = _SETTING.fullmatch(value)
    return found(whole[1]) if whole else _SETTING.sub(lambda match: str(found(match[1])), value)


def _words(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and word of everything in a stage's settings that may be a name; a word with a ``/`` is a path."""
    for key in settings:
        if key not in _MADE_BY:
            continue
        value = settings[key]
        words = list(value) if isinstance(value, list | tuple) else [value]
        if key == "method":
            text = str(value)
            words = text.removeprefix("ensemble:").split(",") if text.startswith("ensemble:") else []
        if key == "candidates":
            words = [word.removeprefix("retrieval:") for word in words if isinstance(word, str)]
        yield from ((key, word.strip()) for word in words if isinstance(word, str) and "/" not in word)
    if isinstance(settings.get("train"), Mapping):  # of a sweep
        yield from _words(settings["train"])


def _raise_together(problems: Sequence[UserError]) -> None:
    if problems:
        remedies = dict.fromkeys(error.remedy for error in problems if error.remedy)
        raise UserError("\n".join(error.problem for error in problems), "\n".join(remedies) or None)


def _needs(entries: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """Name -> earlier steps whose results a step reads.

    Raises:
        UserError: a word that is no name, or the name of a later or of another kind of stage; a cycle.
    """
    needs: dict[str, tuple[str, ...]] = {}
    problems: list[UserError] = []
    for name, (stage, settings) in entries.items():
        found: list[str] = []
        for key, word in _words(settings):
            if (key, word) == ("candidates", "ground_truth"):
                continue
            if word in entries and entries[word][0] in _MADE_BY[key]:
                found.append(word)
            elif word in entries:
                problem = f"{_title(name, stage)}: `{key}: {word}` is a {entries[word][0]} stage"
                problems.append(UserError(problem, f"`{key}` takes the name of {' or '.join(_MADE_BY[key])}."))
            elif key not in ("candidates", "method") or settings.get("dataset") in entries:
                makers = [other for other, (kind, _) in entries.items() if kind in _MADE_BY[key]]
                problem = f"{_title(name, stage)}: `{key}: {word}` is no stage of the recipe{_near(word, makers)}"
                remedy = f"Stages that make one: {', '.join(makers) or 'none'}. A path has a `/`, e.g. ./{word}."
                problems.append(UserError(problem, remedy))
        needs[name] = tuple(dict.fromkeys(found))
    _raise_together(problems)
    _check_order(needs, entries)
    for name, (stage, settings) in entries.items():
        _check_datasets(name, stage, settings, needs, entries)
        # Captions and summaries are part of the dataset.
        earlier = list(entries)[: list(entries).index(name)]
        written = [other for other in earlier if entries[other][0] == "generate"]
        mine = [other for other in written if entries[other][1].get("dataset") == settings.get("dataset")]
        needs[name] = (*needs[name], *mine)
    return needs


def _check_order(needs: Mapping[str, Sequence[str]], entries: Mapping[str, tuple[str, Any]]) -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise UserError(
                f"stages need each other in a circle: {circle}", "Each can only use what earlier ones make."
            )
        for other in needs[name]:
            visit(other, (*path, name))

    order = list(entries)
    for name in order:
        visit(name, ())
    for name in order:
        for other in needs[name]:
            if order.index(other) > order.index(name):
                title = _title(name, entries[name][0])
                raise UserError(f"{title} uses `{other}`, which is made after it", f"Move `{other}` before `{name}`.")


def _check_datasets(
    name: str,
    stage: str,
    settings: Mapping[str, Any],
    needs: Mapping[str, Sequence[str]],
    entries: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> None:
    """Lists and rankings belong to the dataset that they were made from."""
    for other in needs[name]:
        kind, theirs = entries[other]
        if kind in ("retrieve", "rerank") and theirs.get("dataset") != settings.get("dataset"):
            raise UserError(
                f"{_title(name, stage)} works on dataset `{settings.get('dataset')}`, and `{other}` on "
                f"`{theirs.get('dataset')}`",
                "Give both the same dataset.",
            )


# ---- places ----------------------------------------------------------------------------------------------------------


def _place(out: Location, stage: str, name: str) -> Location:
    return out / (f"{name}.parquet" if stage == "rerank" else name)


def _own_place(out: Location, stage: str, name: str) -> dict[str, Any]:
    """The key by which a stage is told where its result goes."""
    if stage == "retrieve":
        return {"name": name}
    return {} if stage == "generate" else {"out": _place(out, stage, name)}


def _with_places(settings: Mapping[str, Any], places: Mapping[str, Location]) -> dict[str, Any]:
    """Settings with the places of earlier stages instead of their names."""

    def placed(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [placed(key, one) for one in value]
        if not isinstance(value, str) or value not in places:
            return value
        # The run that another starts from is one of its settings: the same from wherever the recipe is started.
        return str(places[value].resolve() if key == "model" else places[value])

    by_place = _MADE_BY.keys() - {"candidates", "method"}
    values = {key: placed(key, value) if key in by_place else value for key, value in settings.items()}
    if isinstance(settings.get("train"), Mapping):
        values["train"] = _with_places(settings["train"], places)
    return values


_LAST_FILE = {"prepare": "manifest.json", "train": "result.json", "tune": "best.json", "evaluate": "report.html"}


def _result(out: Location, stage: str, name: str, config: Any) -> tuple[Location, Location | None]:
    """What a stage makes, and the file that shows that it is done."""
    if stage == "generate":
        return config.dataset, None
    if stage in ("retrieve", "rerank"):
        file = _place(out, stage, name) if stage == "rerank" else config.dataset / "candidates" / f"{name}.parquet"
        return file, file
    folder = _place(out, stage, name)
    return folder, folder / _LAST_FILE[stage]
