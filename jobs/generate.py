"""`ray job submit -- python jobs/generate.py DATASET --what caption ...`: the flags of `vlrank generate`."""

from vlrank.config import GenerateConfig
from vlrank.generation.pipeline import dry_run, run
from vlrank.jobs import main

if __name__ == "__main__":
    main(run, GenerateConfig, dry_run=dry_run)
