"""Methods at the same size: settings found by measuring what they store."""
