"""SASRec and BSARec: retrievers that learn which item follows which."""
