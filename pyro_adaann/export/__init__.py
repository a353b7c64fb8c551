"""ArviZ and figures."""
