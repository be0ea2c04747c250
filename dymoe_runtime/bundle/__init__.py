"""The bundle format on disk: layout of records, and reading with checks."""
