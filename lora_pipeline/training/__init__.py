"""Training: one loop over phases, a pure objective, and state that survives being killed."""
