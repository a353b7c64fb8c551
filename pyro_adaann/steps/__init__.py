"""How the parameters move: directions and scores."""
