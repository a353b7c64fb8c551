"""Flows as Pyro autoguides.

A guide knows its flow and its base; it does not know that it is annealed.
"""
