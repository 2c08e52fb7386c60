"""Whole models drawn law by law: the values of `model.init` without its forward pass, its compilation or its memory."""
