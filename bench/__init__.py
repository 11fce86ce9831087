"""How fast, how large, how exact: `python -m bench` measures every number of the README. See
__main__.py."""
