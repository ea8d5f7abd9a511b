"""Pictures from prompts, and the records that say how each was made."""
