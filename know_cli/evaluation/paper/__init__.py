"""The tables of the paper (arXiv 2508.05059), with what was measured here beside them."""
