"""Sources of rows in, a manifest of usable rows and a quarantine table out."""
