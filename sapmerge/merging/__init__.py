"""How a merge runs: inputs, stream, sinks, reports."""
