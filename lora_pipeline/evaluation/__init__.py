"""Numbers for pictures: likeness to a concept, obedience to prompts, and what leaked into the class."""
