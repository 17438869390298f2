"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""
