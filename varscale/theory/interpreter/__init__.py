"""From a model to a report: the walk over its jaxpr, its parameters, and its rows."""
