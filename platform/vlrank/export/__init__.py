"""A trained model as a folder to publish: whole weights, a model card, and how its rankings agree with the run's."""
