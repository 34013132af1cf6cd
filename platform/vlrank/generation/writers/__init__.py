"""From rows with a prompt to rows with an answer, one file per engine."""
