"""One call from a model to draws that can be used: `fit`.

What lives here chooses for the user: base, guide, steps, how often; and says in one verdict what came of it.
"""
