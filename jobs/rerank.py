"""`ray job submit -- python jobs/rerank.py DATASET --model RUN --out FILE ...`: the flags of `vlrank rerank`."""

from vlrank.config import RerankConfig
from vlrank.jobs import main
from vlrank.reranking.pipeline import dry_run, run

if __name__ == "__main__":
    main(run, RerankConfig, dry_run=dry_run)
