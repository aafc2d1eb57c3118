"""Two runs' networks swapped stage by stage while sampling: python -m dpsyngen.swap."""
