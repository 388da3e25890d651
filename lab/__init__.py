"""The evidence: reader (the judge), evaluate (scores), study, report, and bench (speed)."""
