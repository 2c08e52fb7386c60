"""Rules: what primitives become in the graph, one family a file."""
