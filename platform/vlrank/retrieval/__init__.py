"""First-stage retrievers and candidate lists of other programs."""
