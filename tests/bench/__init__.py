"""Speed as ratios inside one run: `make bench`, or `python -m bench heads rate` for some parts."""
