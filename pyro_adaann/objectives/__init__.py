"""What is minimized: a loss of Pyro's on the tempered model, particle by particle."""
