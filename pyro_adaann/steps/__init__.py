"""How the parameters move, once: an optimizer's step and the natural step, with its direction and scores.

A step holds settings; its state is handed on. What moves parameters belongs here, and nothing else.
"""
