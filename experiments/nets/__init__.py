"""The networks of the experiments, and what is measured of each.

A net imports from `experiments.lab` and from other nets, never from an experiment.
"""
