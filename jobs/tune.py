"""`ray job submit -- python jobs/tune.py DATASET --modes all --out SWEEP ...`: the flags of `vlrank tune`."""

from vlrank.config import TuneConfig
from vlrank.jobs import main
from vlrank.tuning.run import dry_run, run

if __name__ == "__main__":
    main(run, TuneConfig, dry_run=dry_run)
