"""Published figures, what was measured here, and the pages of results/ that show both."""
