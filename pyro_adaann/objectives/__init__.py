"""What is minimized: a loss of Pyro's on the tempered model, or the importance weights of the guide's draws.

Modules here read the traces of model and guide. Each loss declares what it supports (`capabilities.py`).
"""
