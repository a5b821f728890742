"""When something happens in a run: one concern a file, chosen in the configuration."""
