"""ArviZ and figures.

What lives here turns a fit into data and pictures of other libraries, which are imported when they are used.
"""
