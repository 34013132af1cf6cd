"""Windows, the ranker on one engine, baselines that need a model, fusion, and the bulk job."""
