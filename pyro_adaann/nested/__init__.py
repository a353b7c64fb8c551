r"""Nested Laplace: a few outer coordinates on a lattice, all others normal given these.

A hierarchy has scales on which the widths of other numbers depend, and with them necks that a flow does not
reach the end of. Given its scales it is nearly normal, however narrow it is there.
"""
