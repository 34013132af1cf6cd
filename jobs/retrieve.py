"""`ray job submit -- python jobs/retrieve.py DATASET --method item_knn ...`: the flags of `vlrank retrieve`."""

from vlrank.config import RetrieveConfig
from vlrank.evaluation.retrieve import plan, run
from vlrank.jobs import main

if __name__ == "__main__":
    main(run, RetrieveConfig, plan=plan)
