"""A page in the browser to try a model: paint a hole and fill it, extend, generate, compare candidates.

`abilities` says what a model can do and does it, `jobs` lets one request after the other compute, and
`server` answers browsers and refuses other sites.
"""
