"""Programs for work in this tree: the demo, the small model, and the launcher that they and the tests use."""
