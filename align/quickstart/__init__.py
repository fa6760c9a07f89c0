"""The whole library in one run on the toy world: `align quickstart`."""
