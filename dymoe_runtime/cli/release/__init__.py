"""Commands of dymoe-bundle for releases: gates, provenance and signatures."""
