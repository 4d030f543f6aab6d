"""Published figures, measured figures, and the pages of results/ that show both."""
