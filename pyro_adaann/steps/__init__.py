"""One update of the parameters: an optimizer's step, or the natural step with its direction and scores.

A step holds settings; its state is passed in and returned. Only code that changes parameters belongs here.
"""
