"""Parts of a compile job: device profiles, progress reports, and the writer of bundles."""
