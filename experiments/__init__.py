"""What initialization does to a network: each experiment is one module here, and ends in claims that are checked.

`python -m experiments` lists them, `python -m experiments NAME` runs one and `python -m experiments all` runs all of them
and writes one report. To add one, see `experiments.lab.experiment`.
"""
