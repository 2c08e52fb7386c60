"""The statistics of what layers put out, reduced inside jit."""
