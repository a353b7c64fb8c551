"""Flows as Pyro autoguides."""
