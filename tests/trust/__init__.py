"""Rules of the house about faults, threads, global state and provenance: one module per kind."""
