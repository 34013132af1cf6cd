"""The results of a sweep in words and tables; without Ray."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vlrank.console import console
from vlrank.tuning import space as spaces
from vlrank.tuning.trials import Trial, interval


def selection(default: Trial, best: Trial, confirmation: Sequence[Trial]) -> dict[str, Any]:
    """The winner's gain over the defaults, and the part of it that was selection noise.

    The best of many noisy values is too good on average. Winner and default, trained again on seeds that had no part in
    the choice, show the gain to expect; the rest of the sweep's gain was noise.
    """
    # Where ASHA stopped the defaults early, their final value is unknown.
    values = {"gain": best.value - default.value} if default.epochs and default.status == "completed" else {}
    seeds: dict[str, dict[str, float]] = {"best": {}, "default": {}}
    number = best.trial_id.rpartition("-")[2]
    for trial in confirmation:
        role, of, seed = trial.trial_id.removeprefix(f"{trial.mode}-").split("-")
        if trial.epochs and trial.status == "completed" and (role == "default" or of == number):
            seeds[role][seed] = trial.value
    if best is default:
        seeds["default"] = seeds["best"]
    pairs = [seeds["best"][seed] - seeds["default"][seed] for seed in seeds["best"] if seed in seeds["default"]]
    if not pairs:
        return values
    gain = statistics.fmean(pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return (
        values
        | {
            "confirmed_value": statistics.fmean(seeds["best"].values()),
            "confirmed_gain": gain,
            "confirmed_gain_se": error,
            "seeds": len(pairs),
        }
        | ({"selection_noise": values["gain"] - gain} if values else {})
    )


def verdict(default: Trial, best: Trial, chosen: Mapping[str, Any]) -> str:
    """The mode's line of the summary; ``chosen`` holds the result of `selection`."""
    around = interval(best)
    text = f"{best.metric} {best.value:.4f}" + (f" [{around[0]:.4f}, {around[1]:.4f}]" if around else "")
    point = ", ".join(f"{key} {value}" for key, value in best.config.items())
    if best is default:
        text += f" with the defaults ({point}): no trial was better"
    elif not default.epochs:
        text += f" by {best.trial_id} ({point}); the default configuration failed, so the gain is unknown"
    elif default.status != "completed" and best.value >= default.value:
        text += f" by {best.trial_id} ({point}); ASHA stopped the defaults at epoch {default.epochs_run:g} with "
        text += f"{default.value:.4f}, so the gain is unknown"
    elif best.value < default.value:
        text += f" by {best.trial_id} ({point}), BELOW the defaults' {default.value:.4f}, which ASHA stopped early"
    else:
        text += f" by {best.trial_id} ({point}), {chosen['gain']:+.4f} over the defaults"
    if chosen.get("seeds") and best is not default:
        error = chosen["confirmed_gain_se"]
        text += f"; on {chosen['seeds']} fresh seeds {chosen['confirmed_gain']:+.4f}"
        text += f" ± {error:.4f}" if error is not None else ""
        if "selection_noise" in chosen:
            text += f": {chosen['selection_noise']:+.4f} of the gain was selection noise"
    elif chosen.get("seeds"):
        text += f"; {chosen['confirmed_value']:.4f} on {chosen['seeds']} fresh seeds"
    return text


def show_table(mode: str, trials: Sequence[Trial], best: Trial | None) -> None:
    """The mode's trials on the terminal, the winner marked."""
    from rich.table import Table

    keys = [key for key in trials[0].config if key in ("lr", "batch_size")]
    keys += [key for key in spaces.names([trial.config for trial in trials]) if key not in keys]
    metric = trials[0].metric
    on_gpus = any(trial.gpus for trial in trials)
    table = Table(title=f"{mode}: {len(trials)} trials by validation {metric}", title_justify="left")
    for heading in ("trial", *keys, "epochs", "why it ended", metric, "95% interval", "GPU-min" if on_gpus else "min"):
        table.add_column(heading, justify="left" if heading in ("trial", "why it ended") else "right")
    for trial in sorted(trials, key=lambda trial: -trial.value):
        around = interval(trial)
        cells = [
            trial.trial_id + (" (defaults)" if trial is trials[0] else ""),
            *(f"{trial.config.get(key, '')}" for key in keys),
            f"{trial.epochs_run:g}",
            trial.stop_reason or trial.status,
            f"{trial.value:.4f}" if trial.epochs else "",
            f"{around[0]:.4f} to {around[1]:.4f}" if around else "",
            f"{trial.seconds / 60 * (trial.gpus or 1):.2f}",
        ]
        table.add_row(*cells, style="bold green" if trial is best else None)
    console.print(table)


def one_line(trial: Trial, trials: Sequence[Trial]) -> str:
    """A finished trial, for the log of a running sweep."""
    point = " ".join(f"{key}={value}" for key, value in trial.config.items())
    done = sum(other.finished for other in trials)
    value = f"{trial.metric} {trial.value:.4f}" if trial.epochs else "no evaluation"
    end = f"after {trial.epochs_run:g} epochs, {trial.stop_reason}"
    return f"{trial.trial_id} ({done}/{len(trials)}) {point}: {value} {end}"
