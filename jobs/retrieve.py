"""`ray job submit -- python jobs/retrieve.py DATASET --method item_knn ...`: the flags of `vlrank retrieve`."""

from vlrank.config import RetrieveConfig
from vlrank.jobs import main
from vlrank.retrieval.retrieve import dry_run, run

if __name__ == "__main__":
    main(run, RetrieveConfig, dry_run=dry_run)
