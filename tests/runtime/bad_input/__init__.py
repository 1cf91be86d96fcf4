"""Every kind of bad input, given to Python and to the command line: one clear error, and nothing changed.

The command line says what Python's exception says, in at most two lines, and returns the code of its kind.
"""
