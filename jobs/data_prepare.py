"""`ray job submit -- python jobs/data_prepare.py --dataset_code beauty --min_rating 3 --min_uc 20 --min_sc 20 ...`.

Takes every flag of `vlrank prepare`, and the historic ``--generate_caption`` and ``--generate_semantic_summary``, which
run `vlrank generate` afterwards; its keys are given as ``--generate model=NAME``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vlrank.config import GenerateConfig, PrepareConfig, load_config
from vlrank.console import Summary
from vlrank.data.prepare import run as prepare
from vlrank.jobs import main

EXTRA = (
    click.Option(["--generate_caption"], is_flag=True, help="Then write captions."),
    click.Option(["--generate_semantic_summary"], is_flag=True, help="Then write semantic summaries."),
    click.Option(["--generate"], multiple=True, metavar="KEY=VALUE", help="A key of `vlrank generate`; repeatable."),
)


def job(argv: Sequence[str] | None = None) -> NoReturn:
    """Prepare, then generate the requested texts; all configs are checked before anything is done."""
    requested: dict[str, Any] = {}

    def adapt(given: dict[str, Any]) -> dict[str, Any]:
        requested.update({key: given.pop(key) for key in ("generate_caption", "generate_semantic_summary", "generate")})
        return given

    def stages(config: PrepareConfig) -> Summary:
        texts = [what for what in ("caption", "semantic_summary") if requested[f"generate_{what}"]]
        configs = [
            load_config(GenerateConfig, overrides=requested["generate"], dataset=config.folder, what=what)
            for what in texts
        ]
        summary = prepare(config)
        for generate_config in configs:
            from vlrank.generation.pipeline import run as generate

            summary.show()
            summary = generate(generate_config)
        return summary

    main(stages, PrepareConfig, argv, adapt=adapt, extra=EXTRA)


if __name__ == "__main__":
    job()
