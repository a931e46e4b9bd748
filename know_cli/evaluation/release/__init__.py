"""The evaluation in the regime of the release of the method's authors, for ``know eval``."""
