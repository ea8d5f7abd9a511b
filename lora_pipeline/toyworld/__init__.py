"""The toy world: its drawings, the embedded base trained on them, and the judge that scores both."""
