"""Show published figures beside measured ones, on the pages of results/."""
