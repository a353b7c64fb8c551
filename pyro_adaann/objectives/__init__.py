"""What is minimized: a loss of Pyro's on the tempered model, or the weights of draws, particle by particle.

What lives here reads the traces of model and guide. A loss says itself what it can bear (`capabilities.py`).
"""
