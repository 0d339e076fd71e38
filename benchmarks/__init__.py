"""Comparing strategies: workloads, a runner, and results that can be kept and read.

One comparison trains each strategy on the same data in the same order from the same weights, once
per seed, and measures what a step costs in slices that take turns. `standard` is the control.
"""
