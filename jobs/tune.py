"""`ray job submit -- python jobs/tune.py DATASET --modes all --out SWEEP ...`: the flags of `vlrank tune`."""

from vlrank.config import TuneConfig
from vlrank.jobs import main
from vlrank.tuning.run import plan, run

if __name__ == "__main__":
    main(run, TuneConfig, plan=plan)
