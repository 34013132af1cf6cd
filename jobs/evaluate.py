"""`ray job submit -- python jobs/evaluate.py DATASET --rankings FILE --out DIR ...`: the flags of `vlrank evaluate`."""

from vlrank.config import EvaluateConfig
from vlrank.evaluation.run import dry_run, run
from vlrank.jobs import main

if __name__ == "__main__":
    main(run, EvaluateConfig, dry_run=dry_run)
