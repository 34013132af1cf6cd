"""`ray job submit -- python jobs/run.py RECIPE.yaml KEY=VALUE ...`: the arguments of `vlrank run`."""

from vlrank.jobs import main
from vlrank.recipes.recipe import RunConfig
from vlrank.recipes.run import dry_run, run

if __name__ == "__main__":
    main(run, RunConfig, dry_run=dry_run)
