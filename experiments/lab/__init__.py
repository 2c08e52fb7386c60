"""What the experiments share: claims, data, training, pictures, the runner and its reports.

Nothing here imports an experiment or a net.
"""
