"""Windows, the ranker on one engine, rivals that need a model, and the bulk job."""
